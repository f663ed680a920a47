"""Full-catalogue ranking of held-out targets (docs/mathematics.md): HR@k, NDCG@k and MRR.

rank = 1 + #{j ≠ t : score_j ≥ score_t}: ties count against the target. Scores are made a tile at a time by
`crossan_fast.ops.rank_of_target`; no users × items matrix exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from crossan_fast import _sources, ops
from crossan_fast._checks import check_tensor, describe, nearest
from crossan_fast._modes import evaluating
from crossan_fast.cache import HiddenStateCache
from crossan_fast.config import CrossanConfig
from crossan_fast.data import Split
from crossan_fast.model import CATALOGUE_CHUNK, CrossanModel
from crossan_fast.training.processes import Processes
from crossan_fast.training.train_config import FilterHistory

_HINT = "; a split of interactions read with this cache's item_names and catalogue='all' has its rows"

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Result:
    """Metrics and the protocol that they were taken with.

    Attributes:
        metrics: `hr@k`, `ndcg@k` for each k, and `mrr`; shares, not percent.
        split: which target was held out.
        filter_history: which items of a user's own history were no candidates.
        users: how many targets were ranked; one a user with leave-one-out.
        candidates: how many items each target was ranked among, itself included.
        note: what else to know, such as items of the cache that took no part; empty where there is nothing.
        held_out: how targets were held out, in words.
    """

    metrics: dict[str, float]
    split: Part
    filter_history: FilterHistory
    users: int
    candidates: int
    note: str = ""
    held_out: str = "leave-one-out"

    @property
    def protocol(self) -> str:
        """The protocol in words; goes wherever the numbers go."""
        targets = f"{self.split} targets of {self.users:,} users"
        if self.held_out != "leave-one-out":
            targets = f"{self.users:,} {self.split} targets ({self.held_out})"
        return (
            f"{targets}, full ranking of {self.candidates:,} items, "
            f"filter_history={self.filter_history}, ties against the target"
            + (f"; {self.note}" if self.note else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "protocol": self.protocol}

    def __str__(self) -> str:
        cutoffs = [name.removeprefix("hr@") for name in self.metrics if name.startswith("hr@")]
        lines = [self.protocol, f"{'k':>6} {'HR@k %':>8} {'NDCG@k %':>9}"]
        for k in cutoffs:
            hr, ndcg = self.metrics[f"hr@{k}"], self.metrics[f"ndcg@{k}"]
            lines.append(f"{k:>6} {100 * hr:8.2f} {100 * ndcg:9.2f}")
        return "\n".join([*lines, f"MRR {100 * self.metrics['mrr']:.2f} %"])


def evaluate(
    model: CrossanModel,
    cache: HiddenStateCache,
    split: Split,
    part: Part = "test",
    *,
    k: Sequence[int] = (5, 10, 20),
    filter_history: FilterHistory = "all_except_target",
    candidates: Tensor | None = None,
    batch_size: int = 1024,
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
        k: cut-offs, each below the number of candidates, so that the last rank never is a hit.
        filter_history: `all` removes every item of the user's history, as IISAN does: a target that repeats
            one can never be hit; `all_except_target` keeps the target; `none` removes nothing.
        candidates: int64 `[C]`, distinct ids to rank among, the targets included; None: all that the split
            knows and the model can embed (`embeddable`).
        batch_size: users ranked at once.
        processes: of a run with several: each encodes its share of the items and ranks its share of the
            users, whole batches at a time, so that the result is that of one process; every process calls.

    Raises:
        ValueError: a wrong option; a cache whose first rows are not the split's; an item's or a user's
            embedding that is not finite.
    """
    inputs, targets, history = _held_out(split, part)
    if inputs.device != model.item_popularity.device:
        wanted = model.item_popularity.device
        raise ValueError(f"split: expected device {wanted} as the model, got {describe(inputs)}")
    cache.catalogue.require(split.catalogue, "split", _HINT)
    for ids in (inputs, targets):
        _sources.refuse_bare(model.config, cache, ids, "split")
    if candidates is None:
        candidates = embeddable(model.config, cache, split.num_items, inputs.device)
    else:
        _sources.refuse_bare(model.config, cache, candidates, "candidates")
    total = split.num_items if candidates is None else candidates.numel()
    check_cutoffs(k, total)
    processes = processes or Processes()
    items = _catalogue(model, cache, _last_row(cache, split, candidates), processes)
    _refuse_nonfinite(items, cache)
    with evaluating(model):
        ranks = rank_targets(
            model,
            items,
            inputs,
            targets,
            excluded(history, targets, filter_history),
            candidates=candidates,
            batch_size=batch_size,
            processes=processes,
        )
    note = ""
    if split.num_items < cache.num_items:
        note = f"the split knows {split.num_items:,} of the cache's {cache.num_items:,} items"
    return Result(metrics_of(ranks, k), part, filter_history, ranks.numel(), total, note, split.kind)


def embeddable(
    config: CrossanConfig, cache: HiddenStateCache, known: int, device: torch.device
) -> Tensor | None:
    """int64 rows of 1 to `known` with at least one of the config's modalities; None: all of them have."""
    bare = _sources.bare_in(config, cache, device)
    if bare is None or not bool(bare[: known + 1].any()):
        return None
    return (~bare[: known + 1]).nonzero().flatten()[1:]  # without padding


@torch.no_grad()
def rank_targets(
    model: CrossanModel,
    items: Tensor,
    inputs: Tensor,
    targets: Tensor,
    exclude: Tensor | None,
    *,
    candidates: Tensor | None = None,
    batch_size: int = 1024,
    processes: Processes | None = None,
) -> Tensor:
    """The rank of each user's target.

    Args:
        model: in evaluation mode; encodes users alone.
        items: `[I + 1, d]`, embeddings of the catalogue.
        inputs: int64 `[U, S]`, left-padded with 0.
        targets: int64 `[U]`.
        exclude: int64 `[U, H]`, ids that are no candidates, 0 for none; or None.
        candidates, batch_size, processes: see `evaluate`.

    Returns:
        int64 `[U]`.
    """
    ranked, place = items, None
    if candidates is not None:
        place = torch.zeros(items.shape[0], dtype=torch.int64, device=items.device)
        place[candidates] = torch.arange(1, candidates.numel() + 1, device=items.device)
        ranked = torch.cat([items[:1], items[candidates]])
        if bool((place[targets] == 0).any()):
            wrong = int(targets[place[targets] == 0][0])
            raise ValueError(f"candidates: expected every target among them, item {wrong} is not")
    processes = processes or Processes()
    ranks = torch.zeros_like(targets)
    for start in range(0, targets.numel(), batch_size)[processes.rank :: processes.size]:
        rows = slice(start, start + batch_size)
        history = inputs[rows]
        users = model.encode_users(items[history], history != 0)[:, -1].contiguous()
        if not bool(torch.isfinite(users).all()):
            user = start + int((~torch.isfinite(users).all(dim=1)).nonzero()[0])
            raise ValueError(f"model: the embedding of user {user} is not finite")
        wanted, banned = targets[rows], None if exclude is None else exclude[rows]
        if place is not None:
            wanted, banned = place[wanted], None if banned is None else place[banned]
        backend = model.backend_for("rank_of_target")
        ranks[rows] = ops.rank_of_target(users, ranked.to(users.dtype), wanted, banned, backend=backend)
    return processes.sum(ranks)


def _held_out(split: Split, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and histories of a part."""
    if part not in get_args(Part):
        raise ValueError(
            f"part: expected one of {list(get_args(Part))}, got {part!r}{nearest(part, get_args(Part))}"
        )
    if part == "validation":
        return split.validation_input, split.validation_target, split.history_validation
    return split.test_input, split.test_target, split.history_test


def _last_row(cache: HiddenStateCache, split: Split, candidates: Tensor | None) -> int:
    """The last item that has to be encoded."""
    last = split.num_items if candidates is None else max(split.num_items, int(candidates.max()))
    if last > cache.num_items:
        raise ValueError(f"candidates: expected rows 1 to {cache.num_items} of the cache, got {last}")
    return last


def _catalogue(model: CrossanModel, cache: HiddenStateCache, known: int, processes: Processes) -> Tensor:
    """Embeddings of the first `known` items, `[known + 1, d]`."""
    device = model.item_popularity.device
    ids = torch.arange(known + 1, device=device)
    if processes.size == 1:
        return model.encode_catalogue(cache, ids=ids)
    # Shares are cut where `encode_catalogue` cuts.
    chunks = ids.split(CATALOGUE_CHUNK)[processes.rank :: processes.size]
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
    """Raise ValueError unless each of `k` is below the number of candidates."""
    for cutoff in k:
        if not 1 <= cutoff < candidates:
            raise ValueError(
                f"k: expected 1 to {candidates - 1}, below the number of candidates, got {cutoff}"
            )


def _refuse_nonfinite(items: Tensor, cache: HiddenStateCache) -> None:
    finite = torch.isfinite(items).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"model: the embedding of item {cache.item_names[row]!r} (row {row}) is not finite")
