"""What a run trains on: the cache, the users' sequences as rows of it, and their split, on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossan_fast.cache import HiddenStateCache
from crossan_fast.data import Catalogue, Dropped, Split, leave_one_out, read_interactions, read_items
from crossan_fast.model import CrossanModel
from crossan_fast.training.evaluation import Part, Result, evaluate
from crossan_fast.training.processes import Processes
from crossan_fast.training.train_config import EvaluationConfig, TrainConfig


@dataclass(frozen=True)
class Task:
    """Attributes:
    cache: holds the items; its first rows are the catalogue of the split.
    split: leave-one-out, on `device`.
    used: int64 `[C]`, ascending: the rows that some user's kept interactions name.
    dropped: what the reader left out.
    taken_for: what the users file was, and which of its columns were read.
    """

    cache: HiddenStateCache
    split: Split
    used: Tensor
    dropped: Dropped
    taken_for: str = ""

    @property
    def device(self) -> torch.device:
        return self.used.device

    def candidates(self, protocol: EvaluationConfig) -> Tensor | None:
        """What a target is ranked among, for `crossan_fast.training.evaluate`."""
        return self.used if protocol.candidates == "used" else None

    def evaluate(
        self,
        model: CrossanModel,
        part: Part,
        protocol: EvaluationConfig,
        *,
        k: Sequence[int] | None = None,
        processes: Processes | None = None,
    ) -> Result:
        """Rank every user's held-out target; see `crossan_fast.training.evaluate`.

        Args:
            model: on `device`.
            part: `validation` or `test`.
            protocol: of the run's config.
            k: cut-offs in place of the protocol's.
            processes: of a run with several; every process calls.
        """
        return evaluate(
            model,
            self.cache,
            self.split,
            part,
            k=protocol.k if k is None else k,
            filter_history=protocol.filter_history,
            candidates=self.candidates(protocol),
            batch_size=protocol.batch_size,
            processes=processes,
        )

    def describe(self) -> str:
        """Sizes in words, for logs."""
        known = self.split.num_items
        grown = "" if known == self.cache.num_items else f" (of the run's own {known:,})"
        return (
            f"{self.taken_for}\n"
            f"{self.split.num_users:,} users, {self.used.numel():,} items of the cache's "
            f"{self.cache.num_items:,}{grown}; left out: {self.dropped}; "
            f"cache {self.cache.tier} on {self.device} ({self.cache.tier_reason})"
        )


def open_task(config: TrainConfig, catalogue: Catalogue | None = None) -> Task:
    """Open the cache and read the users of a config.

    Args:
        catalogue: of a run, which the cache may have grown from: later items are unknown, as they were to
            it; None: every item of the cache is known.

    Raises:
        ValueError: a cache of other items than `catalogue`.
        FileNotFoundError, ValueError: see `HiddenStateCache.open`, `read_interactions`, `leave_one_out`.
    """
    device = resolve_device(config.device)
    cache = HiddenStateCache.open(config.path("cache"), verify=config.verify)
    known = cache.num_items
    if catalogue is not None:
        cache.catalogue.require(
            catalogue, "run", "; expected its own cache, or one grown or converted from it"
        )
        known = catalogue.num_items
    window = config.crossan_config(cache).window
    interactions = read_interactions(
        config.path("users"),
        cache.item_names[: known + 1],
        min_items=config.min_items,
        # The last training row holds window + 1 items, and two more are held out.
        max_items=config.max_items if config.max_items is not None else window + 3,
        strict=config.strict,
        columns=config.columns,
        min_rating=config.min_rating,
    )
    split = leave_one_out(interactions, window)
    used = torch.from_numpy(np.unique(interactions.ids))
    cache.to(device)
    return Task(cache, split.to(device), used.to(device), interactions.dropped, interactions.taken_for)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; ValueError for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def item_titles(path: Path, columns: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Titles by item name; items without one are left out. `columns` as `read_items` takes them."""
    table = read_items(path, columns=columns)
    titles = table.columns.get("title", [None] * len(table))
    return {name: title for name, title in zip(table.names, titles, strict=True) if title}
