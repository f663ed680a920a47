# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Forward kernels of the side network (kernels/README.md has the algebra and the tiling).

With every level's sum x_l = carry_l·h_{l−1} + Σ_k coef_{l,k}·source_k and h_l = x_l + W_up,l a_l + b_up,l,
h is split into what needs no product, u_l = x_l of a tower whose up-projections are zero (biases kept), and
what is left, Σ κ·W_up a, which meets the next down-projection only through small r × r matrices:

    G[l, p] = κ_{l,p} · W_down,l · W_up,p,   κ_{l,p} = Π_{p < j ≤ l} carry_j
    z_l = W_down,l u_l + b_down,l + Σ_{p<l} G[l, p] a_p,    a_l = act(z_l)
    h_L = u_L + Σ_l κ_{L,l} W_up,l a_l

so a program never holds an item's whole width: *down* walks the levels for one chunk of D at a time, *walk*
is a recursion in r, *up* is a product whose result is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import activate, dot, narrow, pick, pick_constant, product_depth
from crossan_fast.kernels.side_network.tiles import (
    advance,
    exists_mask,
    mix,
    open_sources,
    read_level,
    sum_splits,
)


@triton.jit
def down_levels(
    sources,
    coef,
    carry,
    down_weight,
    up_bias,
    out,
    index_n,
    mask_n,
    begin,
    end,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_down,l u_l of levels FIRST … FIRST + COUNT − 1 over columns [begin, end): fp32 [BN, BR] a level.

    Where the last level is among them, u_L is written to `out`. Tiles of the next level are read before the
    product of the present one, so that loads are in flight behind it: a multiprocessor's one program of 8
    warps has nothing else to hide them.
    """
    pointers, masks, strides, scale_pointers = sources
    index_r = tl.arange(0, BLOCK_R)
    mask_r = index_r < R
    z = ()
    for _ in tl.static_range(COUNT):
        z = z + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    index_d = begin + tl.arange(0, BLOCK_D)
    tiles = read_level(pointers, masks, index_d, index_d < end, K)
    for d in range(begin, end, BLOCK_D):
        index_d = d + tl.arange(0, BLOCK_D)
        mask_d = index_d < end
        u = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BN, BD]
        z_next = ()
        level_pointers = pointers
        for level in tl.static_range(FIRST + COUNT):
            current = tiles
            if level >= FIRST:
                weight = tl.load(  # [BD, BR]
                    down_weight + level * R * D + index_r[None, :] * D + index_d[:, None],
                    mask=mask_r[None, :] & mask_d[:, None],
                    other=0,
                )
            if level + 1 < FIRST + COUNT:
                level_pointers = advance(level_pointers, strides, K)
                tiles = read_level(level_pointers, masks, index_d, mask_d, K)
            else:
                tiles = read_level(pointers, masks, index_d + BLOCK_D, index_d + BLOCK_D < end, K)
            if level > 0:
                u = u * tl.load(carry + level)
            u = mix(u, current, scale_pointers, masks, coef, level, K)  # x_l without its up-projections
            if level >= FIRST:
                z_next = z_next + (dot(narrow(u, weight.dtype), weight, z[level - FIRST], PRECISION),)
            u += tl.load(up_bias + level * D + index_d, mask=mask_d, other=0).to(tl.float32)[None, :]
        z = z_next
        if FIRST + COUNT == L:
            tl.store(
                out + index_n.to(tl.int64)[:, None] * D + index_d[None, :],
                narrow(u, out.dtype.element_ty),
                mask=mask_n[:, None] & mask_d[None, :],
            )
    return z


@triton.jit
def walk_level(
    pre,
    level,
    mixing,
    down_bias,
    saved,
    activations,
    index_n,
    mask_n,
    exists,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish z of one level from `pre` [BN, BR], the product with u; save it and its activations.

    `activations` are this block's pointers [BN, 1] to level 0. Levels go through memory (that is, through
    L1): held in registers they would unroll into L(L − 1)/2 products that spill.
    """
    index_r = tl.arange(0, BLOCK_R)
    mask_r = index_r < R
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    index_p = tl.arange(0, DEPTH)
    tile = mixing + index_p[:, None] + BLOCK_R * index_r[None, :]  # G transposed: [r of a, r of z]
    pair = level * (level - 1) // 2
    for p in tl.range(0, level, num_stages=3):
        for r in range(0, BLOCK_R, DEPTH):
            a = tl.load(  # [BN, DEPTH]
                activations + (p * BLOCK_R + r) + index_p[None, :], mask=mask_n[:, None], other=0
            )
            pre = dot(a, tl.load(tile + (pair + p) * (BLOCK_R * BLOCK_R) + r), pre, PRECISION)
    pre += tl.load(down_bias + level * R + index_r, mask=mask_r, other=0).to(tl.float32)[None, :]
    pre = tl.where(exists[:, None], pre, 0.0)
    tl.store(
        saved + (index_n.to(tl.int64)[:, None] * L + level) * R + index_r[None, :],
        narrow(pre, saved.dtype.element_ty),
        mask=mask_n[:, None] & mask_r[None, :],
    )
    a = narrow(activate(pre, GELU), activations.dtype.element_ty)  # [BN, BR]
    tl.store(activations + level * BLOCK_R + index_r[None, :], a, mask=mask_n[:, None])
    tl.debug_barrier()  # other threads of this program read it for the levels after


@triton.jit
def up_columns(
    activations,
    carry,
    up_weight,
    out,
    index_n,
    mask_n,
    exists,
    begin,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = u_L (already there) + Σ_l κ_{L,l} W_up,l a_l for BD columns, by Horner's rule over the levels."""
    index_d = begin + tl.arange(0, BLOCK_D)
    mask_d = index_d < D
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    index_p = tl.arange(0, DEPTH)
    weight = up_weight + index_d[None, :] * R + index_p[:, None]  # [DEPTH, BD]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BN, BD]
    for level in tl.range(0, L, num_stages=3):
        acc *= tl.load(carry + level)
        for r in range(0, BLOCK_R, DEPTH):
            a = tl.load(  # [BN, DEPTH]
                activations + (level * BLOCK_R + r) + index_p[None, :], mask=mask_n[:, None], other=0
            )
            mask_w = mask_d[None, :] & (r + index_p < R)[:, None]
            acc = dot(a, tl.load(weight + level * D * R + r, mask=mask_w, other=0), acc, PRECISION)
    pointer = out + index_n.to(tl.int64)[:, None] * D + index_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    acc += tl.load(pointer, mask=mask, other=0).to(tl.float32)
    tl.store(pointer, narrow(tl.where(exists[:, None], acc, 0.0), pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def down_kernel(
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
    down_weight,
    up_bias,
    out,
    partial,
    N,
    span,
    TOWERS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHERED: tl.constexpr,
    STATIC: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down* alone, for `span` columns a program: partial [splits, T, N, L, BR] and u_L in `out`."""
    tower = tl.program_id(0)
    split = tl.program_id(2)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index = pick_constant(TOWERS, tower)
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
    begin = split * span
    z = down_levels(
        sources,
        coef + index * L * K,
        carry + index * L,
        pick(down_weight, tower),
        pick(up_bias, tower),
        pick(out, tower),
        index_n,
        mask_n,
        begin,
        tl.minimum(begin + span, D),
        FIRST,
        COUNT,
        L,
        D,
        R,
        K,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        PRECISION,
    )
    row = (split * tl.num_programs(0) + tower).to(tl.int64) * N + index_n
    pointer = partial + (row * L * BLOCK_R)[:, None] + tl.arange(0, BLOCK_R)[None, :]
    for level in tl.static_range(COUNT):
        tl.store(pointer + (FIRST + level) * BLOCK_R, z[level], mask=mask_n[:, None])


@triton.jit(do_not_specialize=["N", "splits"])
def walk_kernel(
    partial,
    mixing,
    down_bias,
    saved,
    activations,
    present,
    present_stride,
    N,
    splits,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*walk* alone: sums the partial products in a fixed order, saves z, writes activations [T, N, L, BR]."""
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index = pick_constant(TOWERS, tower).to(tl.int64)
    row = ((tower.to(tl.int64) * N + index_n) * L * BLOCK_R)[:, None]
    offset = row + tl.arange(0, BLOCK_R)[None, :]
    split_stride = tl.num_programs(0).to(tl.int64) * N * L * BLOCK_R
    exists = exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    for level in range(L):
        walk_level(
            sum_splits(partial + offset + level * BLOCK_R, mask_n, splits, split_stride, BLOCK_N, BLOCK_R),
            level,
            mixing + index * (L * (L - 1) // 2 * BLOCK_R * BLOCK_R),
            pick(down_bias, tower),
            pick(saved, tower),
            activations + row,
            index_n,
            mask_n,
            exists,
            L,
            R,
            BLOCK_R,
            GELU,
            PRECISION,
        )


@triton.jit(do_not_specialize=["N"])
def up_kernel(
    activations,
    carry,
    up_weight,
    out,
    present,
    present_stride,
    N,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*up* alone, BD columns a program."""
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    row = tower.to(tl.int64) * N + index_n
    up_columns(
        activations + (row * L * BLOCK_R)[:, None],
        carry + pick_constant(TOWERS, tower) * L,
        pick(up_weight, tower),
        pick(out, tower),
        index_n,
        mask_n,
        exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND),
        tl.program_id(2) * BLOCK_D,
        L,
        D,
        R,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        PRECISION,
    )
