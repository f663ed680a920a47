"""Scores of users against the catalogue a tile at a time, shared by the plain ranking references."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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
