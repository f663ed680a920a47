"""Full-catalogue ranking of held-out targets (docs/mathematics.md): HR@k, NDCG@k and MRR.

rank = 1 + #{j ≠ t : score_j ≥ score_t}: ties count against the target. Scores are made a tile at a time by
`crossan_fast.ops.rank_of_target`; no users × items matrix exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from crossan_fast import _sources
from crossan_fast._checks import check_integer, check_tensor, cutoffs_of, describe, nearest, refuse_path
from crossan_fast._finite import refuse_nonfinite_items
from crossan_fast._modes import evaluating
from crossan_fast.cache import HiddenStateCache
from crossan_fast.config import CrossanConfig
from crossan_fast.data import Split
from crossan_fast.model import CrossanModel
from crossan_fast.training.list_metrics import list_metrics
from crossan_fast.training.processes import Processes
from crossan_fast.training.ranking import Ranking, Users, users_of
from crossan_fast.training.result import Part, Result
from crossan_fast.training.ties import equals_of, metrics_at_random
from crossan_fast.training.train_config import FilterHistory

_HINT = "; a split of interactions read with this cache's item_names and catalogue='all' has its rows"


@dataclass(frozen=True)
class Protocol:
    """Of an evaluation: all that is no recommender; see `evaluate` for the arguments."""

    cache: HiddenStateCache
    split: Split
    part: Part
    k: Sequence[int]
    filter_history: FilterHistory
    candidates: Tensor | None
    batch_size: int
    lists: bool
    processes: Processes

    def __post_init__(self) -> None:
        held_out(self.split, self.part)
        self.cache.catalogue.require(self.split.catalogue, "split", _HINT)
        check_cutoffs(self.k, self.total)
        check_integer("batch_size", self.batch_size, 1)

    @property
    def total(self) -> int:
        return self.split.num_items if self.candidates is None else self.candidates.numel()

    def embedded(self, model: CrossanModel) -> Tensor:
        """What the model makes of the items that are needed, `[known + 1, d]`."""
        if self.split.test_input.device != (wanted := model.item_popularity.device):
            got = describe(self.split.test_input)
            raise ValueError(f"split: expected device {wanted} as the model, got {got}")
        last = _last_row(self.split, self.candidates)
        items = _catalogue(model, self.cache, last, self.processes)
        refuse_nonfinite_items(items, self.cache.item_names)
        return items

    def judge(self, users: Users, items: Tensor, own: Tensor, backend: Callable[[str], str]) -> Result:
        """Rank the targets by inner products of `users` and `items`; lists differ by embeddings `own`."""
        _, targets, history = held_out(self.split, self.part)
        exclude = excluded(history, targets, self.filter_history)
        ranking = Ranking(
            items,
            exclude,
            candidates=self.candidates,
            batch_size=self.batch_size,
            processes=self.processes,
            backend=backend,
        )
        ranks = ranking.ranks(users, targets)
        equals = equals_of(targets, items, self.candidates, exclude)
        tied = int(equals.count_nonzero())
        counts = torch.zeros(items.shape[0], dtype=torch.int64, device=items.device)
        counts[: self.split.num_items + 1] = self.split.train_counts
        best: dict[str, float] = {}
        if self.lists:
            top = ranking.best(users, targets.numel(), max(self.k))
            best = list_metrics(top, self.k, self.total, counts, own)
        return Result(
            metrics_of(ranks, self.k),
            self.part,
            self.filter_history,
            ranks.numel(),
            self.total,
            self._note(),
            self.split.kind,
            best,
            _by_target(ranks, counts[targets] == 0, self.k) if self.lists else {},
            tied,
            metrics_at_random(ranks, equals, self.k) if tied else {},
        )

    def _note(self) -> str:
        known, held = self.split.num_items, self.cache.num_items
        return f"the split knows {known:,} of the cache's {held:,} items" if known < held else ""


def evaluate(
    model: CrossanModel,
    cache: HiddenStateCache,
    split: Split,
    part: Part = "test",
    *,
    k: int | Sequence[int] = (5, 10, 20),
    filter_history: FilterHistory = "all_except_target",
    candidates: Tensor | None = None,
    batch_size: int = 1024,
    lists: bool = False,
    processes: Processes | None = None,
) -> Result:
    """Rank every user's held-out target in the whole catalogue.

    Args:
        model: put in evaluation mode for the call. It scores items by their states: none of them need be what
            it was trained on.
        cache: holds the items; its first rows are the split's. Items of one that grew since take no part
            unless `candidates` names them, and the result's note says so.
        split: on the model's device.
        part: `validation` or `test`.
        k: a cut-off or several, each below the number of candidates, so that the last rank never is a hit.
        filter_history: `all` removes every item of the user's history, as IISAN does: a target that repeats
            one can never be hit; `all_except_target` keeps the target; `none` removes nothing.
        candidates: int64 `[C]`, distinct ids to rank among, the targets included; None: all that the split
            knows and the model can embed (`embeddable`).
        batch_size: users ranked at once.
        lists: also what the lists of the best are like (`crossan_fast.training.list_metrics`), and the
            metrics of targets that training never saw apart from those of the others.
        processes: of a run with several: each encodes its share of the items and ranks its share of the
            users, whole batches at a time, so that the result is that of one process; every process calls.

    Raises:
        ValueError: a wrong option; a cache whose first rows are not the split's; an item's or a user's
            embedding that is not finite.
    """
    candidates = candidates_for(model.config, cache, split, part, candidates)
    processes = processes or Processes()
    protocol = Protocol(
        cache, split, part, cutoffs_of("k", k), filter_history, candidates, batch_size, lists, processes
    )
    items = protocol.embedded(model)
    with evaluating(model):
        users = users_of(model, items, held_out(split, part)[0])
        result = protocol.judge(users, items, items, model.backend_for)
    return result.noting(
        f"{result.tied:,} targets have an equal among their candidates" if result.tied else ""
    )


def candidates_for(
    config: CrossanConfig, cache: HiddenStateCache, split: Split, part: Part, candidates: Tensor | None
) -> Tensor | None:
    """What the targets of a part are ranked among: see `evaluate`.

    Raises:
        ValueError, TypeError: an item of the part, or a candidate, that the config's model cannot embed;
            candidates that are no rows of the cache, or not distinct.
    """
    refuse_path(cache)
    if not isinstance(split, Split):
        raise TypeError(f"split: expected a Split, as leave_one_out gives, got {type(split).__name__}")
    cache.catalogue.require(split.catalogue, "split", _HINT)
    inputs, targets, _ = held_out(split, part)
    for ids in (inputs, targets):
        _sources.refuse_bare(config, cache, ids, "split")
    if candidates is None:
        return embeddable(config, cache, split.num_items, inputs.device)
    check_tensor("candidates", candidates, (None,), dtypes=(torch.int64,), device=inputs.device)
    _refuse_wrong_rows(candidates, cache.num_items)
    _sources.refuse_bare(config, cache, candidates, "candidates")
    return candidates


def _refuse_wrong_rows(candidates: Tensor, held: int) -> None:
    """Raise for what is no row, or for a row that is there twice: either would count beside the targets."""
    rows, counts = candidates.unique(return_counts=True)
    wrong = rows[(rows < 1) | (rows > held)]
    if len(wrong):
        raise ValueError(f"candidates: expected rows 1 to {held} of the cache, got {int(wrong[-1])}")
    again = rows[counts > 1]
    if len(again):
        raise ValueError(
            f"candidates: expected each row once, got {len(again):,} more than once, such as {int(again[0])}"
        )


def embeddable(
    config: CrossanConfig, cache: HiddenStateCache, known: int, device: torch.device
) -> Tensor | None:
    """int64 rows of 1 to `known` with at least one of the config's modalities; None: all of them have."""
    bare = _sources.bare_in(config, cache, device)
    if bare is None or not bool(bare[: known + 1].any()):
        return None
    return (~bare[: known + 1]).nonzero().flatten()[1:]  # without padding


def _by_target(ranks: Tensor, cold: Tensor, k: Sequence[int]) -> dict[str, dict[str, float]]:
    """Metrics of the targets that training never saw, and of the others."""
    parts = {"cold": ranks[cold], "warm": ranks[~cold]}
    return {
        name: {"targets": part.numel()} | (metrics_of(part, k) if part.numel() else {})
        for name, part in parts.items()
    }


def held_out(split: Split, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and histories of a part."""
    if part not in get_args(Part):
        raise ValueError(
            f"part: expected one of {list(get_args(Part))}, got {part!r}{nearest(part, get_args(Part))}"
        )
    if part == "validation":
        return split.validation_input, split.validation_target, split.history_validation
    return split.test_input, split.test_target, split.history_test


def _last_row(split: Split, candidates: Tensor | None) -> int:
    """The last item that has to be encoded."""
    return split.num_items if candidates is None else max(split.num_items, int(candidates.max()))


def _catalogue(model: CrossanModel, cache: HiddenStateCache, known: int, processes: Processes) -> Tensor:
    """Embeddings of the first `known` items, `[known + 1, d]`."""
    device = model.item_popularity.device
    ids = torch.arange(known + 1, device=device)
    if processes.size == 1:
        return model.encode_catalogue(cache, ids=ids)
    # Shares are cut where `encode_catalogue` cuts.
    chunks = ids.split(_sources.CATALOGUE_CHUNK)[processes.rank :: processes.size]
    items = torch.zeros(known + 1, model.config.embedding_dim, device=device)
    if chunks:
        mine = torch.cat(chunks)
        items[mine] = model.encode_catalogue(cache, ids=mine).to(items.dtype)
    return processes.sum(items)


def excluded(history: Tensor, targets: Tensor, filter_history: FilterHistory) -> Tensor | None:
    """Ids that are no candidates `[U, H]`, 0 for none, under a history filter; None where there are none."""
    options = get_args(FilterHistory)
    if filter_history not in options:
        raise ValueError(
            f"filter_history: expected one of {list(options)}, got {filter_history!r}"
            f"{nearest(str(filter_history), options)}"
        )
    if filter_history == "none":
        return None
    if filter_history == "all":
        return history
    return torch.where(history == targets[:, None], 0, history)


def metrics_of(ranks: Tensor, k: Sequence[int]) -> dict[str, float]:
    """HR@k, NDCG@k = 1/log2(rank + 1) and MRR of ranks `[U]` (1 is best), as means over users."""
    check_tensor("ranks", ranks, (None,), dtypes=(torch.int64,))
    if not ranks.numel():
        raise ValueError("ranks: expected at least one user, got none")
    exact = ranks.cpu().double()
    gain = 1 / torch.log2(exact + 1)
    metrics: dict[str, float] = {}
    for cutoff in k:
        hit = exact <= cutoff
        metrics[f"hr@{cutoff}"] = float(hit.double().mean())
        metrics[f"ndcg@{cutoff}"] = float(torch.where(hit, gain, 0).mean())
    metrics["mrr"] = float((1 / exact).mean())
    return metrics


def fitting_cutoffs(k: Sequence[int], candidates: int) -> tuple[int, ...]:
    """A config's cut-offs where there are so many candidates: the largest below stands for all above."""
    return tuple(sorted({min(cutoff, candidates - 1) for cutoff in k}))


def check_cutoffs(k: Sequence[int], candidates: int) -> None:
    """Raise unless `k` is one integer or more, each below the number of candidates."""
    if not k:
        raise ValueError("k: expected at least one cut-off, got none")
    for cutoff in k:
        if not 1 <= cutoff < candidates:
            raise ValueError(
                f"k: expected 1 to {candidates - 1}, below the number of candidates, got {cutoff}"
            )
