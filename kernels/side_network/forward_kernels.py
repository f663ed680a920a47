# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Forward kernels of the side network (kernels/README.md has the algebra and the tiling).

With every level's sum x_l = carry_l·h_{l−1} + Σ_k coef_{l,k}·source_k and h_l = x_l + W_up,l a_l + b_up,l,
the head counts as one level more, L, without sources, activation or carry (carry_L = 1): all that reads an h
is W_down,l or W_head, written W_l. h splits into u_l = Σ κ·coef·source, which needs no product, what
activations add, and what biases add; κ_{l,p} = Π_{p < j ≤ l} carry_j, and once a call (gate_kernels.py)

    G[l, p] = κ_{l,p} · W_l · W_up,p      const_l = b_l + W_l Σ_{p<l} κ_{l,p} b_up,p

so that an item needs no more than

    z_l = W_l u_l + const_l + Σ_{p<l} G[l, p] a_p,   a_l = act(z_l),   e = z_L

and nothing of width D is ever made: *down* forms the products with u, all levels for one chunk of D at a
time, *walk* is a recursion in r. An item's row of products, ROW numbers, holds z'_0 … z'_{L−1}, BLOCK_R each,
then e', BLOCK_E.
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
    head_weight,
    begin,
    end,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_l u_l of levels FIRST … FIRST + COUNT − 1 over columns [begin, end): fp32 [BN, BR] a level.

    Where the last level is among them, W_head u_L [BN, BE] follows. Tiles of the next level are read before
    the product of the present one, so that loads are in flight behind it: a multiprocessor's one program of 8
    warps has nothing else to hide them.
    """
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    K: tl.constexpr = SIZES[4]
    pointers, masks, strides, scale_pointers = sources
    index_r = tl.arange(0, BLOCK_R)
    index_e = tl.arange(0, BLOCK_E)
    mask_r = index_r < R
    z = ()
    for _ in tl.static_range(COUNT):
        z = z + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    if FIRST + COUNT == L:
        z = z + (tl.zeros((BLOCK_N, BLOCK_E), tl.float32),)
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
            u = mix(u, current, scale_pointers, masks, coef, level, K)
            if level >= FIRST:
                z_next = z_next + (dot(narrow(u, weight.dtype), weight, z[level - FIRST], PRECISION),)
        if FIRST + COUNT == L:
            weight = tl.load(  # [BD, BE]
                head_weight + index_e[None, :] * D + index_d[:, None],
                mask=(index_e < E)[None, :] & mask_d[:, None],
                other=0,
            )
            z_next = z_next + (dot(narrow(u, weight.dtype), weight, z[COUNT], PRECISION),)
        z = z_next
    return z


@triton.jit
def add_activations(
    acc,
    matrices,
    count,
    activations,
    mask_n,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BN, BX] + Σ_{p < count} a_p G[p]ᵀ, with G's `count` matrices [BX, BR] one after the other.

    `activations` are this block's pointers [BN, 1] to level 0. Levels go through memory (that is, through
    L1): held in registers they would unroll into L(L + 1)/2 products that spill.
    """
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    index_p = tl.arange(0, DEPTH)
    tile = matrices + index_p[:, None] + BLOCK_R * tl.arange(0, BLOCK_X)[None, :]  # transposed: [DEPTH, BX]
    for p in tl.range(0, count, num_stages=3):
        for r in range(0, BLOCK_R, DEPTH):
            a = tl.load(  # [BN, DEPTH]
                activations + (p * BLOCK_R + r) + index_p[None, :], mask=mask_n[:, None], other=0
            )
            acc = dot(a, tl.load(tile + p * (BLOCK_X * BLOCK_R) + r), acc, PRECISION)
    return acc


@triton.jit
def walk_level(
    pre,
    level,
    mixing,
    constants,
    saved,
    activations,
    mask_n,
    exists,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish z of one level from `pre` [BN, BR], the product with u; save it and its activations.

    `saved` and `activations` are this block's pointers [BN, 1] to level 0.
    """
    index_r = tl.arange(0, BLOCK_R)
    matrices = mixing + (level * (level - 1) // 2) * (BLOCK_R * BLOCK_R)
    pre = add_activations(pre, matrices, level, activations, mask_n, BLOCK_R, BLOCK_R, PRECISION)
    pre += tl.load(constants + level * BLOCK_R + index_r)[None, :]
    pre = tl.where(exists[:, None], pre, 0.0)
    tl.store(
        saved + level * R + index_r[None, :],
        narrow(pre, saved.dtype.element_ty),
        mask=mask_n[:, None] & (index_r < R)[None, :],
    )
    a = narrow(activate(pre, GELU), activations.dtype.element_ty)  # [BN, BR]
    tl.store(activations + level * BLOCK_R + index_r[None, :], a, mask=mask_n[:, None])
    tl.debug_barrier()  # other threads of this program read it for the levels after


@triton.jit
def walk_head(
    pre,
    mixing,
    constants,
    out,
    activations,
    mask_n,
    exists,
    SIZES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish e from `pre` [BN, BE], the product with u_L, and write it; `out` as `activations`, [BN, 1]."""
    L: tl.constexpr = SIZES[0]
    E: tl.constexpr = SIZES[3]
    index_e = tl.arange(0, BLOCK_E)
    matrices = mixing + L * (L - 1) // 2 * BLOCK_R * BLOCK_R
    pre = add_activations(pre, matrices, L, activations, mask_n, BLOCK_E, BLOCK_R, PRECISION)
    pre += tl.load(constants + L * BLOCK_R + index_e)[None, :]
    tl.store(
        out + index_e[None, :],
        narrow(tl.where(exists[:, None], pre, 0.0), out.dtype.element_ty),
        mask=mask_n[:, None] & (index_e < E)[None, :],
    )


@triton.jit
def open_walk(
    mixing,
    constants,
    out,
    saved,
    activations,
    tower,
    index,
    index_n,
    N,
    saved_items,
    SIZES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A tower's G and constants, then a block's rows [BN, 1] of `out`, `saved` and `activations`."""
    L: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    ALL: tl.constexpr = SIZES[5]
    index = index.to(tl.int64)
    matrices = mixing + index * (L * (L - 1) // 2 * BLOCK_R * BLOCK_R + L * BLOCK_E * BLOCK_R)
    constants += index * (L * BLOCK_R + BLOCK_E)
    out_rows = out + ((index_n.to(tl.int64) * ALL + index) * E)[:, None]
    saved_rows = saved + ((index * saved_items + index_n) * (L * R))[:, None]
    a_rows = activations + ((tower.to(tl.int64) * N + index_n) * (L * BLOCK_R))[:, None]
    return matrices, constants, out_rows, saved_rows, a_rows


@triton.jit(do_not_specialize=["N", "saved_items"])
def fused_kernel(
    read,
    presence,
    gates,
    readers,
    mixing,
    constants,
    out,
    saved,
    activations,
    N,
    saved_items,
    GROUP: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down* and *walk* of one tower and one block of items: one launch for all towers and levels."""
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    K: tl.constexpr = SIZES[4]
    TOWERS: tl.constexpr = GROUP[0]
    coef, carry = gates
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index = pick_constant(TOWERS, tower)
    z = down_levels(
        open_sources(read, presence, tower, index_n, mask_n, GROUP, K),
        coef + index * L * K,
        carry + index * L,
        pick(readers[0], tower),
        pick(readers[1], tower),
        0,
        D,
        0,
        L,
        SIZES,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        BLOCK_E,
        PRECISION,
    )
    exists = exists_mask(presence, tower, index_n, mask_n, GROUP)
    matrices, constants, out_rows, saved_rows, a_rows = open_walk(
        mixing,
        constants,
        out,
        saved,
        activations,
        tower,
        index,
        index_n,
        N,
        saved_items,
        SIZES,
        BLOCK_R,
        BLOCK_E,
    )
    for level in tl.static_range(L):
        walk_level(
            z[level],
            level,
            matrices,
            constants,
            saved_rows,
            a_rows,
            mask_n,
            exists,
            SIZES[2],
            BLOCK_R,
            GELU,
            PRECISION,
        )
    walk_head(z[L], matrices, constants, out_rows, a_rows, mask_n, exists, SIZES, BLOCK_R, BLOCK_E, PRECISION)


@triton.jit(do_not_specialize=["N"])
def down_kernel(
    read,
    presence,
    gates,
    readers,
    partial,
    N,
    span,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down* alone, for `span` columns a program: partial [splits, T, N, ROW]."""
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    K: tl.constexpr = SIZES[4]
    TOWERS: tl.constexpr = GROUP[0]
    coef, carry = gates
    tower = tl.program_id(0)
    split = tl.program_id(2)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index = pick_constant(TOWERS, tower)
    begin = split * span
    z = down_levels(
        open_sources(read, presence, tower, index_n, mask_n, GROUP, K),
        coef + index * L * K,
        carry + index * L,
        pick(readers[0], tower),
        pick(readers[1], tower),
        begin,
        tl.minimum(begin + span, D),
        FIRST,
        COUNT,
        SIZES,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        BLOCK_E,
        PRECISION,
    )
    row = (split * tl.num_programs(0) + tower).to(tl.int64) * N + index_n
    pointer = partial + (row * (L * BLOCK_R + BLOCK_E))[:, None]
    for level in tl.static_range(COUNT):
        place = (FIRST + level) * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(pointer + place[None, :], z[level], mask=mask_n[:, None])
    if FIRST + COUNT == L:
        place = L * BLOCK_R + tl.arange(0, BLOCK_E)
        tl.store(pointer + place[None, :], z[COUNT], mask=mask_n[:, None])


@triton.jit(do_not_specialize=["N", "saved_items", "splits"])
def walk_kernel(
    partial,
    presence,
    mixing,
    constants,
    out,
    saved,
    activations,
    N,
    saved_items,
    splits,
    GROUP: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*walk* alone: sums the partial products in a fixed order, writes z, a [T, N, L, BR] and e."""
    L: tl.constexpr = SIZES[0]
    TOWERS: tl.constexpr = GROUP[0]
    ROW: tl.constexpr = L * BLOCK_R + BLOCK_E
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    matrices, constants, out_rows, saved_rows, a_rows = open_walk(
        mixing,
        constants,
        out,
        saved,
        activations,
        tower,
        pick_constant(TOWERS, tower),
        index_n,
        N,
        saved_items,
        SIZES,
        BLOCK_R,
        BLOCK_E,
    )
    part = partial + ((tower.to(tl.int64) * N + index_n) * ROW)[:, None]
    split_stride = tl.num_programs(0).to(tl.int64) * N * ROW
    exists = exists_mask(presence, tower, index_n, mask_n, GROUP)
    for level in range(L):
        pointer = part + level * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        walk_level(
            sum_splits(pointer, mask_n[:, None], splits, split_stride),
            level,
            matrices,
            constants,
            saved_rows,
            a_rows,
            mask_n,
            exists,
            SIZES[2],
            BLOCK_R,
            GELU,
            PRECISION,
        )
    pre = sum_splits(
        part + L * BLOCK_R + tl.arange(0, BLOCK_E)[None, :], mask_n[:, None], splits, split_stride
    )
    walk_head(pre, matrices, constants, out_rows, a_rows, mask_n, exists, SIZES, BLOCK_R, BLOCK_E, PRECISION)
