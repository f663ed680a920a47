# mypy: disable-error-code="assignment"
"""The side network's forward in one launch: *down*, *walk* and *up* of forward_kernels.py by one program."""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import pick, pick_constant
from crossan_fast.kernels.side_network.forward_kernels import down_levels, up_columns, walk_level
from crossan_fast.kernels.side_network.tiles import (
    exists_mask,
    open_sources,
)


@triton.jit(do_not_specialize=["N"])
def fused_kernel(
    states,
    row_strides,
    level_strides,
    scales,
    scale_strides,
    ids,
    present,
    present_stride,
    coef,
    carry,
    mixing,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    out,
    saved,
    activations,
    N,
    TOWERS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHERED: tl.constexpr,
    STATIC: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down*, *walk* and *up* of one tower and one block of items: one launch for all towers and levels."""
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index = pick_constant(TOWERS, tower)
    out_pointer = pick(out, tower)
    sources = open_sources(
        states,
        row_strides,
        level_strides,
        scales,
        scale_strides,
        ids,
        present,
        present_stride,
        tower,
        index_n,
        mask_n,
        SLOTS,
        COLUMNS,
        GATHERED,
        K,
        STATIC,
    )
    z = down_levels(
        sources,
        coef + index * L * K,
        carry + index * L,
        pick(down_weight, tower),
        pick(up_bias, tower),
        out_pointer,
        index_n,
        mask_n,
        0,
        D,
        0,
        L,
        L,
        D,
        R,
        K,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        PRECISION,
    )
    exists = exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    row = tower.to(tl.int64) * N + index_n
    rows = activations + (row * L * BLOCK_R)[:, None]
    for level in tl.static_range(L):
        walk_level(
            z[level],
            level,
            mixing + index.to(tl.int64) * (L * (L - 1) // 2 * BLOCK_R * BLOCK_R),
            pick(down_bias, tower),
            pick(saved, tower),
            rows,
            index_n,
            mask_n,
            exists,
            L,
            R,
            BLOCK_R,
            GELU,
            PRECISION,
        )
    for begin in range(
        0, D, BLOCK_U
    ):  # u_L and the activations were written before walk_level's last barrier
        up_columns(
            rows,
            carry + index * L,
            pick(up_weight, tower),
            out_pointer,
            index_n,
            mask_n,
            exists,
            begin,
            L,
            D,
            R,
            BLOCK_N,
            BLOCK_U,
            BLOCK_R,
            PRECISION,
        )
