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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BU: tl.constexpr,
    BR: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down*, *walk* and *up* of one tower and one block of items: one launch for all towers and levels."""
    tower = tl.program_id(0)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < N
    index = pick_constant(TOWERS, tower)
    here = pick(out, tower)
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
        offs_n,
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
        here,
        offs_n,
        mask_n,
        0,
        D,
        0,
        L,
        L,
        D,
        R,
        K,
        BN,
        BD,
        BR,
        PRECISION,
    )
    exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    row = tower.to(tl.int64) * N + offs_n
    rows = activations + (row * L * BR)[:, None]
    for level in tl.static_range(L):
        walk_level(
            z[level],
            level,
            mixing + index.to(tl.int64) * (L * (L - 1) // 2 * BR * BR),
            pick(down_bias, tower),
            pick(saved, tower),
            rows,
            offs_n,
            mask_n,
            exists,
            L,
            R,
            BR,
            GELU,
            PRECISION,
        )
    for begin in range(0, D, BU):  # u_L and the activations were written before walk_level's last barrier
        up_columns(
            rows,
            carry + index * L,
            pick(up_weight, tower),
            here,
            offs_n,
            mask_n,
            exists,
            begin,
            L,
            D,
            R,
            BN,
            BU,
            BR,
            PRECISION,
        )
