"""What a run's best/training.json says: see `crossan_fast.card`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossan_fast.training.overrides import flatten
from crossan_fast.training.population import Population
from crossan_fast.training.task import Task
from crossan_fast.training.train_config import TrainConfig

_RESULTS = ("best_epoch", "epochs", "precision", "parameters", "validation", "test", "versions")
# Where files lie on the machine that trained is nobody else's business.
_PLACES = (
    *("cache", "users", "items", "run", "data", "init_from"),
    *("evaluation.users", "split.validation", "split.test"),
)


def record_of(
    task: Task, config: TrainConfig, results: Mapping[str, Any], held: Population
) -> dict[str, Any]:
    """Encoders with pooling and levels, digests of the data, settings, metrics with protocols, versions.

    Args:
        held: the run's, which names it and the run that it started from.
    """
    return {
        "run": held.run,
        **({} if config.init_from is None else {"started_from": held.origin}),
        "sources": {name: _shared(source) for name, source in task.cache.sources.items()},
        "data": Population.of(task).data(),
        "settings": {key: value for key, value in flatten(config.to_dict()) if key not in _PLACES},
        **{key: results[key] for key in _RESULTS},
    }


def _shared(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source with the names of files and folders in place of their paths."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in source.items()
    }
