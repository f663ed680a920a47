"""What binds a run to its config, items and users, so that it goes on with no others."""

from __future__ import annotations

from collections.abc import Sequence

from crossan_fast._digests import digest_of
from crossan_fast.training.overrides import flatten
from crossan_fast.training.population import Population
from crossan_fast.training.task import Task
from crossan_fast.training.train_config import TrainConfig

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
    # Where the other run lies says nothing of what it is, and no weight of it is read again.
    started = (old.init_from is None) != (new.init_from is None)
    for key in sorted(before.keys() | after.keys()):
        differs = started if key == "init_from" else before.get(key) != after.get(key)
        if differs and key not in _FREE:
            raise ValueError(
                f"{key}: the run was made with {before.get(key)!r}, expected the same to go on with it, "
                f"got {after.get(key)!r}"
            )


def refuse_others(held: Population | None, task: Task, modalities: Sequence[str]) -> None:
    """Raise ValueError where a run's items, states or users are not those of the task."""
    if held is None:
        return
    held.require_states(task.cache, modalities)
    if difference := held.difference(Population.of(task), "training", "validation"):
        raise ValueError(
            f"cache, users: expected those of the run to go on with it, got others: {difference}"
        )


def name_of_run(config: TrainConfig, population: Population) -> str:
    """Of all that binds a run's numbers, so that equal runs write equal files.

    Args:
        population: its origin stands for `init_from`, which says where that lies.
    """
    bound = {key: value for key, value in flatten(config.to_dict()) if key not in _FREE}
    if config.init_from is not None:
        bound["init_from"] = population.origin
    return digest_of([bound, {**population.data(), "sources": population.sources, "run": ""}])[:16]
