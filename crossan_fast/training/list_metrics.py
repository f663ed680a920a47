"""What lists of recommendations are like beside being right: coverage, novelty, diversity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coverage(lists: Tensor, candidates: int) -> float:
    """The share of the candidates that is on any list.

    Catalogue coverage of Ge, Delgado-Battenfeld and Jannach, "Beyond accuracy", RecSys 2010.

    Args:
        lists: int64 `[U, k]`, 0 for no item.
        candidates: how many items could be on one.
    """
    return torch.unique(lists[lists != 0]).numel() / candidates


def novelty(lists: Tensor, train_counts: Tensor) -> float:
    """The mean of −log2 p(i) over the items of a list, then over the lists, in bits.

    Mean self-information of Zhou et al., PNAS 107(10), 2010; with p(i) as the share of training interactions
    that item i has, in place of their share of users. ◊ An item that training never saw counts as one that
    was taken once, as the losses have it.

    Args:
        lists: int64 `[U, k]`, 0 for no item; a list without any counts 0.
        train_counts: `[I + 1]`.
    """
    counts = train_counts.double()
    bits = -torch.log2(counts.clamp(min=1) / counts[1:].sum())
    return _mean(torch.where(lists != 0, bits[lists], 0).sum(dim=1), (lists != 0).sum(dim=1))


def diversity(lists: Tensor, items: Tensor) -> float:
    """The mean of 1 − cos(i, j) over the pairs of a list's items, then over the lists.

    Intra-list distance of Ziegler et al., WWW 2005, and Zhang and Hurley, RecSys 2008, by the embeddings
    of one model: what two models give is compared with care.

    Args:
        lists: int64 `[U, k]`, 0 for no item; a list of fewer than two counts 0.
        items: `[I + 1, d]`; an embedding of zeros is at distance 1 from all.
    """
    unit = torch.nn.functional.normalize(items.double(), dim=1)
    unit[0] = 0
    total = torch.zeros(lists.shape[0], dtype=torch.float64, device=items.device)
    own = torch.zeros_like(total)
    # Σ_{i ≠ j} cos(i, j) = |Σ_i u_i|² − Σ_i |u_i|²: no pair is made.
    for rows in torch.arange(lists.shape[0], device=items.device).split(4096):
        chosen = unit[lists[rows]]
        total[rows] = chosen.sum(dim=1).square().sum(dim=1)
        own[rows] = chosen.square().sum(dim=(1, 2))
    held = (lists != 0).sum(dim=1)
    pairs = held * (held - 1)
    return _mean(pairs - (total - own), pairs)


def list_metrics(
    lists: Tensor, k: Sequence[int], candidates: int, train_counts: Tensor, items: Tensor
) -> dict[str, float]:
    """`coverage@k`, `novelty@k` and, from two items on, `diversity@k` of lists `[U, max(k)]`."""
    metrics: dict[str, float] = {}
    for cutoff in k:
        best = lists[:, :cutoff]
        metrics[f"coverage@{cutoff}"] = coverage(best, candidates)
        metrics[f"novelty@{cutoff}"] = novelty(best, train_counts)
        if cutoff > 1:
            metrics[f"diversity@{cutoff}"] = diversity(best, items)
    return metrics


def _mean(sums: Tensor, counts: Tensor) -> float:
    """The mean over lists of a list's mean; 0 of nothing."""
    return float((sums.double() / counts.clamp(min=1)).mean())
