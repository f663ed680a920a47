"""What ranking ops share: scores as the plain references see them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crossan_fast.kernels._common import dot


@triton.jit
def scores(user, item, PRECISION: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr):
    """⟨user, item⟩ `[BU, BI]` rounded to the inputs' type, then fp32, so that ties are those of that type.

    NaN becomes −inf: an item whose score is no number is not recommended, and a target's ranks last.
    """
    zero = tl.zeros([BLOCK_U, BLOCK_I], dtype=tl.float32)
    score = dot(user, tl.trans(item), zero, PRECISION).to(item.dtype).to(tl.float32)
    return tl.where(score == score, score, float("-inf"))


def tile(dtype: torch.dtype, width: int, tf32: bool) -> tuple[int, int, int, int]:
    """(users, items) of a tile of scores, warps and pipeline stages: none of them spills registers."""
    if dtype == torch.float32 and not tf32:
        return (32, 32, 8, 2) if width <= 64 else (16, 16, 4, 1)
    if width <= 64:
        return 64, 64, 4, 3
    return (32, 32, 4, 2) if width <= 256 else (16, 16, 8, 1)
