"""What ranking ops share: scores as the plain references see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._autotune import bucket, tuned
from crossan_fast.kernels._common import device_name, dot, dot_precision


@triton.jit
def scores(user, item, PRECISION: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr):
    """⟨user, item⟩ `[BU, BI]` rounded to the inputs' type, then fp32, so that ties are those of that type.

    NaN becomes −inf: an item whose score is no number is not recommended, and a target's ranks last.
    """
    zero = tl.zeros([BLOCK_U, BLOCK_I], dtype=tl.float32)
    score = dot(user, tl.trans(item), zero, PRECISION).to(item.dtype).to(tl.float32)
    return tl.where(score == score, score, float("-inf"))


class Tile(NamedTuple):
    """Users and items of a tile of scores, warps and pipeline stages."""

    users: int
    items: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, width: int, tf32: bool) -> Tile:
    """rank_of_target's: the widest of which none spills registers."""
    if dtype == torch.float32 and not tf32:
        return Tile(32, 32, 8, 2) if width <= 64 else Tile(16, 16, 4, 1)
    if width <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(32, 32, 4, 2) if width <= 256 else Tile(16, 16, 8, 1)


def best_tile(
    op: str, choices: Sequence[Tile], users: Tensor, items: Tensor, run: Callable[[Tile], object], *key: int
) -> Tile:
    """The first of `choices`, or the one `run` is fastest with where autotuning is on."""
    (batch, width), columns, dtype = users.shape, items.shape[0], users.dtype
    sizes = (width, bucket(batch), bucket(columns), *key)
    return tuned(op, (device_name(users.device), dtype, dot_precision(dtype), *sizes), choices, run)
