"""What binds a run to its config, items and users, so that it goes on with no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from crossan_fast._digests import digest_of
from crossan_fast.training.population import Population
from crossan_fast.training.task import Task
from crossan_fast.training.train_config import TrainConfig, flatten

# What may differ between a run and its continuation: none of it changes the numbers of an epoch.
_FREE = (
    "run",
    "cache",
    "users",
    "items",
    "data",
    "verify",
    "device",
    "backend",
    "epochs",
    "patience",
    "log_every",
    "tensorboard",
    "wandb",
)


def refuse_changes(old: TrainConfig, new: TrainConfig) -> None:
    """Raise ValueError where a run's config differs in what changes numbers."""
    before, after = dict(flatten(old.to_dict())), dict(flatten(new.to_dict()))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key not in _FREE:
            raise ValueError(
                f"{key}: the run was made with {before.get(key)!r}, expected the same to go on with it, "
                f"got {after.get(key)!r}"
            )


def refuse_others(held: Population | None, task: Task, modalities: Sequence[str]) -> None:
    """Raise ValueError where a run's items or users are not those of the task."""
    if held is None:
        return
    held.require_bases(task.cache, modalities)
    if difference := held.difference(Population.of(task)):
        raise ValueError(
            f"cache, users: expected those of the run to go on with it, got others: {difference}"
        )


def name_of_run(config: TrainConfig, population: Population, origin: str = "") -> str:
    """Of all that binds a run's numbers, so that equal runs write equal files.

    Args:
        origin: names the run that it starts from; '': none.
    """
    bound = {key: value for key, value in flatten(config.to_dict()) if key not in _FREE}
    return digest_of([bound, asdict(population), *([origin] if origin else [])])[:16]
