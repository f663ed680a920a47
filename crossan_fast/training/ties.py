"""Items with one embedding tie for every user: which targets have such an equal, and what that costs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HASHED, _USERS = 65_536, 16_384  # rows of items, and of users, at a time


def equals_of(targets: Tensor, items: Tensor, candidates: Tensor | None, exclude: Tensor | None) -> Tensor:
    """How many other candidates have each target's very embedding.

    Args:
        targets: int64 `[U]`.
        items: `[I + 1, d]`.
        candidates: int64 `[C]`, distinct; None: all.
        exclude: int64 `[U, H]`, ids that are no candidates for a user, 0 for none; or None.

    Returns:
        int64 `[U]`; 0 where the target itself is excluded, which has no place among its equals then.
    """
    rows = torch.arange(1, len(items), device=items.device) if candidates is None else candidates
    _, among, counts = _sums(items, rows).unique(return_inverse=True, return_counts=True)
    group = among.new_full((len(items),), -1)
    group[rows] = among
    equals = counts[group[targets]] - 1
    if exclude is None:
        return equals
    for tied in equals.nonzero().flatten().split(_USERS):
        banned, wanted = exclude[tied].sort(dim=1).values, targets[tied][:, None]
        first = torch.ones_like(banned, dtype=torch.bool)  # an item may stand in a history more than once
        first[:, 1:] = banned[:, 1:] != banned[:, :-1]
        gone = ((group[banned] == group[wanted]) & first & (banned != wanted)).sum(1)
        itself = (banned == wanted).any(1)
        equals[tied] = torch.where(itself, 0, equals[tied] - gone)
    return equals


def _sums(items: Tensor, rows: Tensor) -> Tensor:
    """int64 for each of `rows`, the same for equal rows, and for others with odds of 2^-43 at most.

    Sums, with wrap-around, of the numbers' bits under random odd factors of 64 bits; by halves, since short
    numbers end in zero bits, and their products would, too.
    """
    made = torch.Generator(device=items.device).manual_seed(0)
    high, low = (
        torch.randint(-(2**62), 2**62, (2, items.shape[1]), generator=made, device=items.device) * 2 + 1
    )
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[items.element_size()]
    half, sums = 4 * items.element_size(), []
    for some in rows.split(_HASHED):
        bits = (items[some] + 0.0).view(whole).long()  # -0 is 0, too
        sums.append(((bits >> half) * high + (bits & (1 << half) - 1) * low).sum(1))
    return torch.cat(sums)


def metrics_at_random(ranks: Tensor, equals: Tensor, k: Sequence[int]) -> dict[str, float]:
    """The mean, over all orders of equals, of what `metrics_of` gives: HR@k, NDCG@k and MRR.

    Args:
        ranks: int64 `[U]`, every equal ahead of the target.
        equals: int64 `[U]`, see `equals_of`: the target stands at `rank - equals` to `rank`, evenly.
    """
    ranks, equals = ranks.cpu(), equals.cpu()
    places = torch.arange(1, int(ranks.max()) + 1).double()
    gain = 1 / torch.log2(places + 1)

    def mean(worth: Tensor) -> float:
        summed = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
        return float(((summed[ranks] - summed[ranks - equals - 1]) / (equals + 1)).mean())

    metrics: dict[str, float] = {}
    for cutoff in k:
        metrics[f"hr@{cutoff}"] = mean((places <= cutoff).double())
        metrics[f"ndcg@{cutoff}"] = mean(torch.where(places <= cutoff, gain, 0))
    metrics["mrr"] = mean(1 / places)
    return metrics
