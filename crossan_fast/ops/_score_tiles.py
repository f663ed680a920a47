"""Scores of users against the catalogue a tile at a time, shared by the plain ranking references."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crossan_fast._checks import check_tensor, describe

TILE = 4096


def score_tiles(users: Tensor, items: Tensor, exclude: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, scores `[B, tile]`) over ids 1 … I; excluded ids score −inf, see `rank_of_target`."""
    for start in range(1, items.shape[0], TILE):
        scores = users @ items[start : start + TILE].T
        if exclude is not None:
            inside = (exclude >= start) & (exclude < start + scores.shape[1])
            # The extra column takes the writes of ids that lie outside the tile.
            column = torch.where(inside, exclude - start, scores.shape[1])
            padded = torch.cat([scores, scores.new_zeros(users.shape[0], 1)], dim=1)
            scores = padded.scatter(1, column, float("-inf"))[:, :-1]
        yield start, scores


def check_ranking(users: Tensor, items: Tensor, exclude: Tensor | None) -> None:
    """Raise unless the arguments that the ranking ops share fit each other."""
    check_tensor("users", users, (None, None))
    check_tensor("items", items, (None, users.shape[1]), dtypes=(users.dtype,))
    if items.shape[0] < 2:
        raise ValueError(f"items: expected a padding row and at least one item, got {describe(items)}")
    if exclude is not None:
        check_tensor("exclude", exclude, (None, None), dtypes=(torch.int64,))
        if exclude.shape[0] != users.shape[0]:
            raise ValueError(f"exclude: expected a row for each row of users, got {describe(exclude)}")
