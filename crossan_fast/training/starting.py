"""A run's model at its first step: fresh, or from another run, with the modalities that the config has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from crossan_fast._checks import nearest
from crossan_fast.config import CrossanConfig
from crossan_fast.model import CrossanModel
from crossan_fast.training.population import Population
from crossan_fast.training.run_folder import RunFolder
from crossan_fast.training.task import Task
from crossan_fast.training.train_config import TrainConfig

# What another run may change of a model and go on from its weights: none of it is a weight, or read with one.
_FREE = (
    "modalities",
    "load_balance",
    "modality_dropout",
    "modality_dropout_scope",
    "dropout",
    "attention",
    "loss",
    "targets",
    "negatives",
    "negative_sampling",
    "label_smoothing",
    "deduplicate",
    "adapter_std",
)


class Start(NamedTuple):
    """Attributes:
    model: on the CPU; what `frozen` names of it needs no gradient.
    frozen: names of modalities whose towers and heads stay as they are.
    origin: names the run that it started from, '' where that is none, or has no name.
    note: what this run's results have to say of that one, '' where there is nothing.
    """

    model: CrossanModel
    frozen: tuple[str, ...]
    origin: str = ""
    note: str = ""


def start(config: TrainConfig, task: Task, folder: RunFolder) -> Start:
    """The model that a run in `folder` begins with, or goes on with: its checkpoint then has the weights.

    Raises:
        FileNotFoundError, ValueError: `init_from` is no run, or one of another model than the config's, its
            modalities apart; a cache that holds other states, or other items, than what it knows by row.
    """
    wanted = config.crossan_config(task.cache)
    if config.init_from is None:
        return Start(CrossanModel(wanted, backend=config.backend), ())
    if folder.last.exists():
        model = CrossanModel(wanted, backend=config.backend)
        held = folder.read_config().freeze if config.freeze is None else config.freeze
        began = folder.read_population()
        whence = ("", "") if began is None else (began.origin, began.note)
        return Start(model, _freeze(model, held or ()), *whence)
    source = RunFolder(config.resolve("init_from", config.init_from))
    trained = source.load_model("best", backend=config.backend)
    population = Population.read(source.population)
    before, names = trained.config.modality_names, wanted.modality_names
    kept = [name for name in before if name in names]
    _refuse_other_states(trained.config, wanted, kept, str(source.path))
    if population is not None:
        population.require_states(task.cache, kept)
    model = _with_modalities(trained, wanted, kept)
    if model.config.id_embedding and trained.catalogue is not None:
        task.cache.catalogue.require(trained.catalogue, "init_from", "; its id embedding is by row")
    grown = set(names) - set(before)
    frozen = _freeze(model, (kept if grown else ()) if config.freeze is None else config.freeze)
    origin = "" if population is None else population.run
    return Start(model, frozen, origin, _note(source, population, task, config))


def _note(source: RunFolder, held: Population | None, task: Task, config: TrainConfig) -> str:
    """Says that a run may have been trained on what another holds out; empty where it was not.

    It was not where both split the same sequences in the same way. Which targets others have in common
    their digests do not say.
    """
    said = f"started from {f'run {held.run}' if held and held.run else 'a run without a name'}"
    if held is None or not source.config.is_file():
        return f"{said}, which does not say what it was trained on: these targets may be among it"
    notes = [] if not held.note else [held.note]
    now = Population.of(task)
    # Rows mean the same items where the catalogue has but grown. What else either trains on is no matter.
    same = task.split.catalogue.starts_with(held.catalogue) and held.sequences == now.sequences
    same = same and held.validation in ("", now.validation)
    why = [] if same else [held.difference(now, "validation")]
    before, after = _targets(source.read_config()), _targets(config)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            why.append(f"{key} {before.get(key)!r} before, {after.get(key)!r} now")
    if why:
        notes.append(f"{said}, which may have been trained on these targets: {', '.join(why)}")
    return "; ".join(notes)


def _targets(config: TrainConfig) -> dict[str, Any]:
    """The settings that say where a user's targets begin, which sequences do not show; files by name.

    Users who are trained on are no held-out ones (`hold_out_users`), so that sequences do show these.
    """
    split = config.split
    found: dict[str, Any] = {"split.by": split.by}
    for key, value in (("split.validation", split.validation), ("split.test", split.test)):
        found[key] = Path(value).name if split.by == "given" and isinstance(value, str) else value
    return found


def _refuse_other_states(before: CrossanConfig, wanted: CrossanConfig, kept: Sequence[str], run: str) -> None:
    """Raise ValueError where a run's weights mean something else under the config that is wanted."""
    if not kept:
        raise ValueError(
            f"init_from: {run} knows {list(before.modality_names)}, expected one of "
            f"{list(wanted.modality_names)} among them"
        )
    order = [*kept, *(name for name in wanted.modality_names if name not in kept)]
    if list(wanted.modality_names) != order:
        raise ValueError(
            f"modalities: expected those of {run} first, and in its order, {order}, got "
            f"{list(wanted.modality_names)}"
        )
    for field in fields(CrossanConfig):
        old, new = getattr(before, field.name), getattr(wanted, field.name)
        if field.init and field.name not in _FREE and old != new:
            raise ValueError(f"model.{field.name}: {run} has {old!r}, expected the same, got {new!r}")
    held = {modality.name: modality for modality in before.modalities}
    for modality in wanted.modalities:
        old = held.get(modality.name, modality)
        if old != modality:
            raise ValueError(f"cache: {run} was trained on {old}, expected the same, got {modality}")


def _with_modalities(trained: CrossanModel, wanted: CrossanConfig, kept: Sequence[str]) -> CrossanModel:
    """`trained` under the config `wanted`, grown by what it lacks, and without what that lacks."""
    for name in trained.config.modality_names:
        if name not in kept:
            trained = trained.remove(name)
    for modality in wanted.modalities[len(kept) :]:
        trained = trained.extend(modality, freeze=False)
    model = CrossanModel(wanted, backend=trained.backend)
    model.load_state_dict(trained.state_dict())
    return model


def _freeze(model: CrossanModel, names: Sequence[str]) -> tuple[str, ...]:
    """Stop the towers and heads of modalities from training, and what passes between them; gives `names`."""
    own = model.config.modality_names
    for name in names:
        if name not in own:
            raise ValueError(f"freeze: expected some of {list(own)}, got {name!r}{nearest(name, own)}")
    for spec in model.config.towers:
        if not all(own[source] in names for source in spec.sources):
            continue
        parts: list[tuple[str, nn.Parameter]] = [
            *model.towers[spec.name].named_parameters(),
            *model.heads[spec.name].named_parameters(),
        ]
        for name, parameter in parts:
            kind, _, sender = name.partition(".")
            # A gate or matrix of a tower that is not frozen is as new as that tower.
            parameter.requires_grad_(kind.startswith("cross") and sender not in names)
    return tuple(names)
