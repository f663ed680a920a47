"""What a run trains on: the cache, the users' sequences as rows of it, and their split, on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossan_fast._sources import bare_in
from crossan_fast.cache import HiddenStateCache
from crossan_fast.data import (
    Catalogue,
    Dropped,
    Interactions,
    Split,
    as_given,
    by_ratio,
    by_time,
    hold_out_users,
    leave_one_out,
    read_interactions,
    read_items,
    split_files,
)
from crossan_fast.model import CrossanModel
from crossan_fast.sasrec import SasRec
from crossan_fast.training.baselines import UNTRAINED, evaluate_baselines
from crossan_fast.training.evaluation import embeddable, evaluate, fitting_cutoffs
from crossan_fast.training.processes import Processes
from crossan_fast.training.result import Part, Result
from crossan_fast.training.train_config import EvaluationConfig, SplitConfig, TrainConfig


@dataclass(frozen=True)
class Task:
    """Attributes:
    cache: holds the items; its first rows are the catalogue of the split.
    split: as the config says, on `device`.
    used: int64 `[C]`, ascending: the rows that some user's kept interactions name.
    dropped: what the reader left out.
    taken_for: what the users file was, and which of its columns were read.
    embeddable: int64 rows of the split's items that have at least one of the model's modalities; None: all.
    """

    cache: HiddenStateCache
    split: Split
    used: Tensor
    dropped: Dropped
    taken_for: str = ""
    embeddable: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.used.device

    def candidates(self, protocol: EvaluationConfig) -> Tensor | None:
        """What a target is ranked among, for `crossan_fast.training.evaluate`."""
        return self.used if protocol.candidates == "used" else self.embeddable

    def num_candidates(self, protocol: EvaluationConfig) -> int:
        """How many items a target is ranked among, itself included."""
        candidates = self.candidates(protocol)
        return self.split.num_items if candidates is None else candidates.numel()

    def evaluate(
        self,
        model: CrossanModel,
        part: Part,
        protocol: EvaluationConfig,
        *,
        k: int | Sequence[int] | None = None,
        lists: bool = False,
        processes: Processes | None = None,
    ) -> Result:
        """Rank every user's held-out target; see `crossan_fast.training.evaluate`.

        Args:
            model: on `device`.
            part: `validation` or `test`.
            protocol: of the run's config.
            k: cut-offs in place of the protocol's, which are fitted to the number of candidates.
            lists: see `crossan_fast.training.evaluate`.
            processes: of a run with several; every process calls.
        """
        options = self._options(protocol, k, lists)
        return evaluate(model, self.cache, self.split, part, processes=processes, **options)

    def evaluate_baselines(
        self,
        model: CrossanModel,
        part: Part,
        protocol: EvaluationConfig,
        *,
        names: Sequence[str] = UNTRAINED,
        sasrec: SasRec | None = None,
        k: int | Sequence[int] | None = None,
        lists: bool = False,
    ) -> dict[str, Result]:
        """See `crossan_fast.training.evaluate_baselines`; other arguments as those of `evaluate`."""
        options = self._options(protocol, k, lists)
        return evaluate_baselines(model, self.cache, self.split, part, names=names, sasrec=sasrec, **options)

    def _options(
        self, protocol: EvaluationConfig, k: int | Sequence[int] | None, lists: bool
    ) -> dict[str, Any]:
        return {
            "k": fitting_cutoffs(protocol.k, self.num_candidates(protocol)) if k is None else k,
            "filter_history": protocol.filter_history,
            "candidates": self.candidates(protocol),
            "batch_size": protocol.batch_size,
            "lists": lists,
        }

    def describe(self) -> str:
        """Sizes in words, for logs."""
        known = self.split.num_items
        grown = "" if known == self.cache.num_items else f" (of the run's own {known:,})"
        return (
            f"{self.taken_for}\n{self.split}\n"
            f"{self.split.num_users:,} users, {self.used.numel():,} items of the cache's "
            f"{self.cache.num_items:,}{grown}; left out: {self.dropped}; "
            f"cache {self.cache.tier} on {self.device} ({self.cache.tier_reason})"
        )


def open_task(
    config: TrainConfig, catalogue: Catalogue | None = None, *, columns: Mapping[str, Any] | None = None
) -> Task:
    """Open the cache and read the users of a config.

    Args:
        catalogue: of a run, which the cache may have grown from: later items are unknown, as they were to
            it; None: every item of the cache is known.
        columns: of `evaluation.users`, by role; None: called as those of the config's own users file.

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
    names, model = cache.item_names[: known + 1], config.crossan_config(cache)
    window, bare = model.window, bare_in(model, cache, torch.device("cpu"))
    rows = [] if bare is None else bare[: known + 1].nonzero().flatten().tolist()
    found = _read(config, config.path("users"), names, None if config.evaluation.users else window, rows)
    used, said = [found.ids], [found.taken_for]
    if config.evaluation.users is not None:
        file = config.resolve("evaluation.users", config.evaluation.users)
        other = config if columns is None else replace(config, columns=columns)
        evaluated = _read(other, file, names, window, rows)
        used, said = [*used, evaluated.ids], [*said, f"{evaluated.taken_for}; left out: {evaluated.dropped}"]
        split = hold_out_users(found, evaluated, window, stride=config.split.stride)
    else:
        split = _split(config.split, found, window)
    cache.to(device)
    ids = torch.from_numpy(np.unique(np.concatenate(used))).to(device)
    embeds = embeddable(model, cache, known, device)
    return Task(cache, split.to(device), ids, found.dropped, "\n".join(filter(None, said)), embeds)


def _read(
    config: TrainConfig, path: Path, names: Sequence[str], window: int | None, bare: Sequence[int]
) -> Interactions:
    """A users file under a config's settings, or its parts where the split comes in files.

    Args:
        window: of the model, where no user counts for more than it needs; None: whole histories.
        bare: rows of items that the model cannot embed.
    """
    split, most = config.split, config.max_items
    if window is not None and split.by == "leave_one_out" and split.stride is None and most is None:
        # The last training row holds window + 1 items, and two more are held out.
        most = window + 3
    return read_interactions(
        users_files(config, path),
        names,
        min_items=config.min_items,
        max_items=most,
        strict=config.strict,
        columns=config.columns,
        min_rating=config.min_rating,
        labels=split.by == "given",
        bare=bare,
    )


def users_files(config: TrainConfig, path: Path) -> Path | dict[str, Path]:
    """The users file `path` of a config, or all parts of it by name where its split comes in files."""
    split = config.split
    if split.by != "given":
        return path
    if isinstance(split.validation, str) and isinstance(split.test, str):
        parts = {"validation": split.validation, "test": split.test}
        return {"train": path} | {part: config.resolve(f"split.{part}", name) for part, name in parts.items()}
    return split_files(path) or path


def _split(config: SplitConfig, found: Interactions, window: int) -> Split:
    if config.by == "given":
        return as_given(found, window, stride=config.stride)
    if config.by == "leave_one_out" or config.validation is None or config.test is None:
        return leave_one_out(found, window, stride=config.stride)
    if config.by == "time":
        return by_time(found, window, config.validation, config.test, stride=config.stride)
    return by_ratio(found, window, float(config.validation), float(config.test), stride=config.stride)


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
