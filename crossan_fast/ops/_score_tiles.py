"""Scores of users against the catalogue a tile at a time, shared by the plain ranking references.

A matrix product sums in an order that depends on where an entry stands (a block's edge takes other code):
items of one embedding would get scores that differ by a rounding, and rank by it. Here every score is the
same sum in the same order, over the features as they come: equal embeddings tie exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crossan_fast._checks import FLOATS, check_tensor, describe

TILE = 4096
# Scores formed at a time on a CPU: as many as stay in a core's cache while the features pass.
BLOCK = 2**18


def dot_products(users: Tensor, items: Tensor) -> Tensor:
    """users `[B, d]` times items `[n, d]` or `[B, n, d]`: `[B, n]`, summed in fp32 at least, rounded once.

    −inf where the sum is no number. NaN compares with nothing, so that a target with it would stand before
    the first, and a sort puts it on top.
    """
    wide = torch.promote_types(users.dtype, torch.float32)
    rows = max(1, users.shape[0])
    if users.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses them itself
        rows = max(1, BLOCK // max(1, items.shape[-2]))
    blocks = [
        _summed(block.to(wide), (items if items.dim() == 2 else items[i * rows : (i + 1) * rows]).to(wide))
        for i, block in enumerate(users.split(rows))
    ]
    return torch.cat(blocks).to(users.dtype)


def _summed(users: Tensor, items: Tensor) -> Tensor:
    scores = users.new_zeros(users.shape[0], items.shape[-2])
    features = items.movedim(-1, 0).contiguous()
    for feature in range(users.shape[1]):
        # Not addcmul: a fused product would round once where the vectors end and twice where they do not.
        scores += users[:, feature, None] * features[feature]
    return scores.masked_fill_(scores.isnan(), float("-inf"))


def score_tiles(users: Tensor, items: Tensor, exclude: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, scores `[B, tile]`) over ids 1 … I; excluded ids score −inf, see `rank_of_target`."""
    for start in range(1, items.shape[0], TILE):
        scores = dot_products(users, items[start : start + TILE])
        if exclude is not None:
            inside = (exclude >= start) & (exclude < start + scores.shape[1])
            # The extra column takes the writes of ids that lie outside the tile.
            column = torch.where(inside, exclude - start, scores.shape[1])
            padded = torch.cat([scores, scores.new_zeros(users.shape[0], 1)], dim=1)
            scores = padded.scatter(1, column, float("-inf"))[:, :-1]
        yield start, scores


def check_ranking(users: Tensor, items: Tensor, exclude: Tensor | None) -> None:
    """Raise unless the arguments that the ranking ops share fit each other."""
    check_tensor("users", users, (None, None), dtypes=FLOATS)
    if users.shape[1] < 1:
        raise ValueError(f"users: expected [B, d] with d of at least 1, got {describe(users)}")
    check_tensor("items", items, (None, users.shape[1]), dtypes=(users.dtype,))
    if items.shape[0] < 2:
        raise ValueError(f"items: expected a padding row and at least one item, got {describe(items)}")
    if exclude is not None:
        check_tensor("exclude", exclude, (None, None), dtypes=(torch.int64,))
        if exclude.shape[0] != users.shape[0]:
            raise ValueError(f"exclude: expected a row for each row of users, got {describe(exclude)}")
