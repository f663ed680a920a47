# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Weight gradients' kernels of the side network: sums over items only (kernels/README.md has the algebra).

In the notation of backward_kernels.py. x_l is u_l and W_up's images of activations, dh_l is g and W_down's
images of dz; so their products with dz_l and a_l over all items need, beside Σ dz_l u_lᵀ (*down_gradient*)
and Σ g a_lᵀ, no more than the r × r matrices Σ dz_q a_pᵀ (both *up_gradient*, a plain product), which weights
multiply once a call and not once an item (finish_kernels.py). Every sum has one owner or is added up in a
fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import (
    dot,
    narrow,
    pick,
    pick_constant,
    product_depth,
)
from crossan_fast.kernels.side_network.tiles import (
    advance,
    exists_mask,
    open_sources,
    read_level,
    source_value,
)


@triton.jit(do_not_specialize=["N"])
def up_gradient_kernel(
    grad_out,
    grad_z,
    activations,
    products,
    sums,
    present,
    present_stride,
    N,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ g aᵀ (rows 0 … D − 1) and Σ dz aᵀ (from row D on): products [T, D + L·BR, L·BR] in fp32.

    A program owns BD rows of one level's columns, for all items. Of dz aᵀ only levels of dz above a's are
    ever read, and tiles without one are not formed. Programs of level L sum g and dz themselves, for the
    biases: sums [T, D + L·BR].
    """
    tower = tl.program_id(0)
    tile = tl.program_id(1)
    level = tl.program_id(2)
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    from_g = tile < chunks
    first = tl.where(from_g, tile, tile - chunks) * BLOCK_D
    width = tl.where(from_g, D, L * BLOCK_R)
    index_x = first + tl.arange(0, BLOCK_D)
    mask_x = index_x < width
    row = tower * (D + L * BLOCK_R) + tl.where(from_g, 0, D) + index_x
    x_pointer = pick(grad_out, tower)
    if not from_g:
        x_pointer = grad_z + tower.to(tl.int64) * N * (L * BLOCK_R)
    if level == L:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, N, BLOCK_N):
            index_n = start + tl.arange(0, BLOCK_N)
            exists = exists_mask(
                present, present_stride, tower, index_n, index_n < N, EXISTS_FIRST, EXISTS_SECOND
            )
            pointer = x_pointer + index_n.to(tl.int64)[:, None] * width + index_x[None, :]
            x = tl.load(pointer, mask=exists[:, None] & mask_x[None, :], other=0)  # [BN, BD]
            total += tl.sum(x.to(tl.float32), 0)
        store_sum(sums + row, total, mask_x, ACCUMULATE)
    elif from_g | (first + BLOCK_D > (level + 1) * BLOCK_R):
        index_r = tl.arange(0, BLOCK_R)
        a_pointer = activations + tower.to(tl.int64) * N * (L * BLOCK_R) + level * BLOCK_R + index_r
        acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)  # [BD, BR]
        for start in range(0, N, BLOCK_N):
            index_n = start + tl.arange(0, BLOCK_N)
            exists = exists_mask(
                present, present_stride, tower, index_n, index_n < N, EXISTS_FIRST, EXISTS_SECOND
            )
            items = index_n.to(tl.int64)[:, None]
            pointer = x_pointer + items * width + index_x[None, :]
            x = tl.load(pointer, mask=exists[:, None] & mask_x[None, :], other=0)  # [BN, BD]
            a = tl.load(a_pointer + items * (L * BLOCK_R), mask=(index_n < N)[:, None], other=0)  # [BN, BR]
            acc = dot(tl.trans(x), a, acc, PRECISION)
        out_pointer = (
            products + row.to(tl.int64)[:, None] * (L * BLOCK_R) + (level * BLOCK_R + index_r)[None, :]
        )
        store_sum(out_pointer, acc, mask_x[:, None], ACCUMULATE)


@triton.jit(do_not_specialize=["N", "ITEMS"])
def down_gradient_kernel(
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
    grad_out,
    grad_z,
    partial,
    gate_partial,
    dx_rows,
    grad_x,
    N,
    ITEMS,
    TOWERS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHERED: tl.constexpr,
    STATIC: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ dz_l u_lᵀ of levels FIRST … FIRST + COUNT − 1: a chunk of columns, ITEMS items of a tower.

    partial [splits, T, L, R, D]. With FIRST = 0 dx of all levels is formed first, downwards, for the gates:
    gate_partial [splits, chunks, T, L, K + 1] receives Σ ⟨dx_l, source_k⟩, then Σ ⟨dx_l, u_{l−1}⟩, and
    grad_x (per tower [N, L, D]), unless None, dx. A block's dx waits in dx_rows [programs, L, BN, BD], a few
    kB that a program rewrites block after block and that stay in cache: it comes in a product's register
    layout, and meets states in theirs.
    """
    tower = tl.program_id(0)
    chunk = tl.program_id(1)
    share = tl.program_id(2) * tl.num_programs(0) + tower
    index_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    index_r = tl.arange(0, BLOCK_R)
    mask_d = index_d < D
    mask_w = (index_r < R)[:, None] & mask_d[None, :]
    index = pick_constant(TOWERS, tower)
    coef += index * L * K
    carry += index * L
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    index_p = tl.arange(0, DEPTH)
    down = pick(down_weight, tower) + index_p[:, None] * D + index_d[None, :]  # [DEPTH, BD]
    bias = pick(up_bias, tower) + index_d
    g_pointer = pick(grad_out, tower) + index_d
    part = partial + share.to(tl.int64) * (L * R * D) + index_r[:, None] * D + index_d[None, :]
    dw = ()  # [BR, BD] a level
    for _ in tl.static_range(COUNT):
        dw = dw + (tl.zeros((BLOCK_R, BLOCK_D), tl.float32),)
    # A number a thread for each level and gate, added up over threads only at the end.
    gates = ()
    if FIRST == 0:
        for _ in tl.static_range(L * (K + 1)):
            gates = gates + (tl.zeros((BLOCK_N, BLOCK_D // BLOCK_V), tl.float32),)
    program = (tl.program_id(2) * tl.num_programs(1) + chunk) * tl.num_programs(0) + tower
    dx_pointer = dx_rows + program.to(tl.int64) * (L * BLOCK_N * BLOCK_D)
    dx_pointer += (tl.arange(0, BLOCK_N) * BLOCK_D)[:, None] + tl.arange(0, BLOCK_D)[None, :]  # [BN, BD]
    begin = tl.program_id(2) * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    for start in range(begin, end, BLOCK_N):
        index_n = start + tl.arange(0, BLOCK_N)
        mask_n = index_n < end
        rows = index_n.to(tl.int64)
        grad_z_pointer = grad_z + ((tower.to(tl.int64) * N + rows) * L * BLOCK_R)[:, None]
        if FIRST == 0:
            tl.debug_barrier()  # the block before has been read
            exists = exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
            mask_g = exists[:, None] & mask_d[None, :]
            dh = tl.load(rows[:, None] * D + g_pointer[None, :], mask=mask_g, other=0).to(tl.float32)
            for level in tl.static_range(L - 1, -1, -1):
                dx = dh
                for r in range(0, BLOCK_R, DEPTH):
                    offset_r = level * BLOCK_R + r + index_p
                    dz = tl.load(  # [BN, DEPTH]
                        grad_z_pointer + offset_r[None, :], mask=mask_n[:, None], other=0
                    )
                    mask_p = (r + index_p < R)[:, None] & mask_d[None, :]
                    dx = dot(dz, tl.load(down + (level * R + r) * D, mask=mask_p, other=0), dx, PRECISION)
                dh = dx * tl.load(carry + level)  # [BN, BD]
                dx = narrow(dx, grad_z.dtype.element_ty)  # [BN, BD]
                tl.store(dx_pointer + level * (BLOCK_N * BLOCK_D), dx)
                if grad_x is not None:
                    out_pointer = (
                        pick(grad_x, tower) + (rows * (L * D))[:, None] + (level * D + index_d)[None, :]
                    )
                    tl.store(out_pointer, dx, mask=mask_n[:, None] & mask_d[None, :])
            tl.debug_barrier()  # written by other threads of this program
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
        pointers, masks, strides, scale_pointers = sources
        u = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BN, BD]
        tiles = read_level(pointers, masks, index_d, mask_d, K)
        dw_next = ()
        gates_next = ()
        for level in tl.static_range(L if FIRST == 0 else FIRST + COUNT):
            current = tiles
            if level + 1 < (L if FIRST == 0 else FIRST + COUNT):  # in flight behind this level's products
                pointers = advance(pointers, strides, K)
                tiles = read_level(pointers, masks, index_d, mask_d, K)
            x = u * tl.load(carry + level)
            if FIRST == 0:
                dx = tl.load(dx_pointer + level * (BLOCK_N * BLOCK_D)).to(tl.float32)  # [BN, BD]
            for k in tl.static_range(K):
                value = source_value(current, scale_pointers, masks, level, k)
                if FIRST == 0:
                    gates_next = gates_next + (
                        gates[level * (K + 1) + k] + thread_sums(dx * value, BLOCK_N, BLOCK_D, BLOCK_V),
                    )
                x += value * tl.load(coef + level * K + k)
            if FIRST == 0:
                gates_next = gates_next + (
                    gates[level * (K + 1) + K] + thread_sums(dx * u, BLOCK_N, BLOCK_D, BLOCK_V),
                )
            if level >= FIRST and level < FIRST + COUNT:
                dz = tl.load(
                    grad_z_pointer + level * BLOCK_R + index_r[None, :], mask=mask_n[:, None], other=0
                )
                dw_next = dw_next + (dot(tl.trans(dz), narrow(x, dz.dtype), dw[level - FIRST], PRECISION),)
            u = x + tl.load(bias + level * D, mask=mask_d, other=0).to(tl.float32)[None, :]
            # Keeps loads of several levels from waiting in registers at once. Without it sm_90 spills 16
            # bytes by Triton 3.6, and sm_80 8 by 3.9 where states are fp8; with it only a second chunk of
            # items does on sm_90, 8 bytes, by 3.6.
            tl.debug_barrier()
        dw = dw_next
        gates = gates_next
    for level in tl.static_range(FIRST, FIRST + COUNT):
        store_sum(part + level * R * D, dw[level - FIRST], mask_w, ACCUMULATE)
    if FIRST == 0:
        for j in tl.static_range(L * (K + 1)):
            pointer = gate_partial + program * (L * (K + 1)) + j
            store_sum(pointer, tl.sum(tl.sum(gates[j], 1), 0), None, ACCUMULATE)


@triton.jit
def thread_sums(x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """[BN, BD / BV]: sums of BV columns side by side, which one thread holds: nothing is exchanged."""
    return tl.sum(tl.reshape(x, (BLOCK_N, BLOCK_D // BLOCK_V, BLOCK_V)), 2)


@triton.jit
def store_sum(pointer, value, mask, ACCUMULATE: tl.constexpr):
    """Write a program's share, or add it to what the chunk of items before left there."""
    if ACCUMULATE:
        value += tl.load(pointer, mask=mask)
    tl.store(pointer, value, mask=mask)
