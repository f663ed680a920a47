"""topk_scores: the k best items of each user by inner product, over tiles of the catalogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossan_fast._checks import check_integer
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define, on_one_device
from crossan_fast.ops._score_tiles import check_ranking, score_tiles


class TopK(NamedTuple):
    """Attributes:
    scores: `[B, min(k, I)]`, descending; −inf where fewer candidates are left.
    ids: int64, likewise; of equal scores the lower id comes first; 0 where the score is −inf.
    """

    scores: Tensor
    ids: Tensor


def topk_scores_reference(users: Tensor, items: Tensor, k: int, exclude: Tensor | None = None) -> TopK:
    """The definition, in plain torch; memory is B × (k + tile), never B × I.

    Args:
        users: `[B, d]`.
        items: `[I + 1, d]`; row 0 is padding and no candidate.
        k: at least 1; what is more than the catalogue's I gives I.
        exclude: int64 `[B, H]`, ids that are no candidates for the row; 0 stands for none.

    An item whose score is NaN, by NaN or inf in the user or in the item, is no candidate, nor is one of
    score −inf: a user with NaN gets no items.
    """
    batch = users.shape[0]
    scores = users.new_full((batch, 0), float("-inf"))
    ids = torch.zeros(batch, 0, dtype=torch.int64, device=users.device)
    for start, tile in score_tiles(users, items, exclude):
        scores = torch.cat([scores, tile], dim=1)
        ids = torch.cat(
            [ids, torch.arange(start, start + tile.shape[1], device=ids.device).expand(batch, -1)], 1
        )
        # Earlier tiles come first and the sort is stable, so equal scores stay in the order of ids.
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        scores, ids = scores[:, :k].contiguous(), ids.gather(1, order[:, :k])
    return TopK(scores, ids.masked_fill(scores == float("-inf"), 0))


@on_one_device
def topk_scores(
    users: Tensor, items: Tensor, k: int, exclude: Tensor | None = None, *, backend: str = "auto"
) -> TopK:
    """The k best items of each user; arguments as `topk_scores_reference`. No gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit, named.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    check_integer("k", k, 1)
    check_ranking(users, items, exclude)
    k = min(k, items.shape[0] - 1)
    users, items = users.detach(), items.detach()
    choice = choose("topk_scores", users.device.type, users.dtype, (), backend)
    if choice.backend == "eager":
        return topk_scores_reference(users, items, k, exclude)
    return TopK(*_topk_scores(users, items, k, exclude, choice.backend))


def _fake(users, items, k, exclude):
    shape = (users.shape[0], k)
    return users.new_empty(shape), users.new_empty(shape, dtype=torch.int64)


_topk_scores = define(
    "topk_scores(Tensor users, Tensor items, int k, Tensor? exclude) -> (Tensor, Tensor)", _fake
)
