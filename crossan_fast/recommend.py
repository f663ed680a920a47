"""From a history of items to the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from crossan_fast import ops
from crossan_fast._modes import evaluating

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.model import CrossanModel


@dataclass(frozen=True)
class Recommendation:
    """Attributes:
    item: its row in the cache.
    name: its name there.
    score: inner product of user and item; comparable within one user only.
    """

    item: int
    name: str
    score: float


@torch.no_grad()
def recommend(
    model: CrossanModel,
    histories: Sequence[Sequence[str | int]],
    cache: HiddenStateCache,
    *,
    k: int = 10,
    filter_history: bool = True,
) -> list[list[Recommendation]]:
    """The k best items for each history; users and items need not have been seen in training.

    Args:
        model: put in evaluation mode for the call.
        histories: item names, or rows of the cache (1 … I), oldest first; the last `window` count.
        cache: every item of it is a candidate, those appended after training too.
        k: how many; fewer come back where the catalogue ends.
        filter_history: leave out the history's own items.

    Raises:
        ValueError: an empty history, an unknown item, k below 1.
    """
    rows = [_rows(history, index, cache) for index, history in enumerate(histories)]
    if not rows:
        return []
    window, device = model.config.window, model.item_popularity.device
    recent = torch.zeros(len(rows), window, dtype=torch.int64, device=device)
    for b, history in enumerate(rows):
        last = torch.tensor(history[-window:], device=device)
        recent[b, window - len(last) :] = last
    exclude = None
    if filter_history:
        padded = pad_sequence([torch.tensor(history) for history in rows], batch_first=True)
        exclude = padded.to(device)
    items = model.encode_catalogue(cache)
    with evaluating(model):
        users = model.encode_users(items[recent], recent != 0)[:, -1]
    backend = model.backend_for("topk_scores")
    top = ops.topk_scores(users.contiguous(), items, k, exclude, backend=backend)
    names = cache.item_names
    return [
        [
            Recommendation(item, names[item], score)
            for item, score in zip(ids, scores, strict=True)
            if item  # 0 fills up where fewer than k are left
        ]
        for ids, scores in zip(top.ids.tolist(), top.scores.tolist(), strict=True)
    ]


def _rows(history: Sequence[str | int], index: int, cache: HiddenStateCache) -> list[int]:
    if isinstance(history, str) or not len(history):
        raise ValueError(f"histories[{index}]: expected at least one item name or row, got {history!r}")
    rows = [cache.row_of(item) if isinstance(item, str) else item for item in history]
    for row in rows:
        if not 1 <= row <= cache.num_items:
            raise ValueError(f"histories[{index}]: expected rows 1 to {cache.num_items}, got {row}")
    return rows
