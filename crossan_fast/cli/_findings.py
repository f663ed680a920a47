"""What there is to see of a run, as numbers: from its folder, its cache and its users."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast._modes import evaluating
from crossan_fast._sources import CATALOGUE_CHUNK
from crossan_fast.cache import HiddenStateCache
from crossan_fast.model import CrossanModel
from crossan_fast.training import RunFolder, Task, open_task
from crossan_fast.training.evaluation import excluded, metrics_of
from crossan_fast.training.ranking import rank_targets
from crossan_fast.training.train_config import EvaluationConfig

MONITOR = "hr@10"


@dataclass(frozen=True)
class Findings:
    """What pictures and the report show of a run.

    Attributes:
        name: of the run.
        history: an entry an epoch, as in `log.jsonl`.
        explained: `CrossanModel.explain` of the run's items.
        layers: by modality, which states of the encoder its levels are; None where the cache does not say.
        protocol: of `without`, in words.
        without: HR@10 by what was taken from every item: nothing ("") first, then each modality.
        points: `[I, 2]`, item embeddings on their two principal axes.
        variance: the share of the embeddings' variance on each of these.
        counts: `[I]`, training interactions of each item.
        parameters: how many the model trains.
    """

    name: str
    history: list[dict[str, Any]]
    explained: dict[str, Any]
    layers: dict[str, list[int] | None]
    protocol: str
    without: dict[str, float]
    points: npt.NDArray[np.float32]
    variance: tuple[float, float]
    counts: npt.NDArray[np.int64]
    parameters: int


def find(run: Path, device: str | None = None) -> Findings:
    """Look at the best model of a run.

    Raises:
        FileNotFoundError: the folder is no run, or one without a finished epoch; its cache or users are gone.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    if device is not None:
        config = replace(config, device=device)
    held = folder.read_population()
    model = folder.load_model("best", backend=config.backend)
    task = open_task(config, None if held is None else held.catalogue)
    if held is not None:
        held.require_states(task.cache, model.config.modality_names)
    model = model.to(task.device)
    names = model.config.modality_names
    rows = torch.arange(task.split.num_items + 1, device=task.device)
    known = rows[1:] if task.embeddable is None else task.embeddable
    items = model.encode_catalogue(task.cache, ids=rows)
    result = task.evaluate(model, "test", config.evaluation, k=(10,))
    without = {"": result.metrics[MONITOR]}
    if len(names) > 1:
        for column, name in enumerate(names):
            without[name] = _hits_without(model, task, config.evaluation, column)
    points, variance = principal_axes(items[known])
    sources = task.cache.sources
    return Findings(
        name=folder.path.name,
        history=folder.read_log(),
        explained=model.explain(known.tolist(), task.cache),
        layers={name: sources.get(name, {}).get("layers") for name in names},
        protocol=result.protocol,
        without=without,
        points=points,
        variance=variance,
        counts=task.split.train_counts[known].cpu().numpy(),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def principal_axes(items: Tensor) -> tuple[npt.NDArray[np.float32], tuple[float, float]]:
    """Coordinates `[I, 2]` of `items` `[I, d]` on their two principal axes, and the axes' shares of variance.

    An axis points to where its largest coordinate is positive, so that the same items give the same map.
    """
    centred = (items - items.mean(dim=0)).double().cpu()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, -2:].flip(1)
    largest = points.gather(0, points.abs().argmax(dim=0, keepdim=True))
    points = points * torch.where(largest < 0, -1.0, 1.0)
    total = float(values.sum()) or 1.0
    shares = (float(values[-1]) / total, float(values[-2]) / total)
    return points.float().numpy(), shares


@torch.no_grad()
def _hits_without(model: CrossanModel, task: Task, protocol: EvaluationConfig, column: int) -> float:
    """HR@10 on the test targets with one modality taken from every item; what has no other is all zeros."""
    split, device = task.split, task.device
    items = torch.zeros(split.num_items + 1, model.config.embedding_dim, device=device)
    names = model.config.modality_names
    columns = [_column(task.cache, name) for name in names]
    present = task.cache.present[: split.num_items + 1][:, columns].clone()
    present[:, column] = False
    with evaluating(model):
        for rows in present.any(dim=1).nonzero().flatten().split(CATALOGUE_CHUNK):
            states = task.cache.gather(rows, device, dtype=torch.float32)
            wanted = {name: states[name] for name in names}
            here, rows = present[rows].to(device), rows.to(device)
            items[rows] = model.encode_items(wanted, here, item_ids=rows).float()
        exclude = excluded(split.history_test, split.test_target, protocol.filter_history)
        ranks = rank_targets(
            model,
            items,
            split.test_input,
            split.test_target,
            exclude,
            candidates=task.candidates(protocol),
            batch_size=protocol.batch_size,
        )
    return metrics_of(ranks, (10,))[MONITOR]


def _column(cache: HiddenStateCache, name: str) -> int:
    return [modality.name for modality in cache.modalities].index(name)
