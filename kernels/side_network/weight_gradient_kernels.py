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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
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
    chunks: tl.constexpr = (D + BD - 1) // BD
    from_g = tile < chunks
    first = tl.where(from_g, tile, tile - chunks) * BD
    width = tl.where(from_g, D, L * BR)
    offs_x = first + tl.arange(0, BD)
    mask_x = offs_x < width
    row = tower * (D + L * BR) + tl.where(from_g, 0, D) + offs_x
    x_at = pick(grad_out, tower)
    if not from_g:
        x_at = grad_z + tower.to(tl.int64) * N * (L * BR)
    if level == L:
        total = tl.zeros((BD,), tl.float32)
        for start in range(0, N, BN):
            offs_n = start + tl.arange(0, BN)
            exists = exists_mask(
                present, present_stride, tower, offs_n, offs_n < N, EXISTS_FIRST, EXISTS_SECOND
            )
            at = x_at + offs_n.to(tl.int64)[:, None] * width + offs_x[None, :]
            x = tl.load(at, mask=exists[:, None] & mask_x[None, :], other=0)
            total += tl.sum(x.to(tl.float32), 0)
        store_sum(sums + row, total, mask_x, ACCUMULATE)
    elif from_g | (first + BD > (level + 1) * BR):
        offs_r = tl.arange(0, BR)
        a_at = activations + tower.to(tl.int64) * N * (L * BR) + level * BR + offs_r
        acc = tl.zeros((BD, BR), tl.float32)
        for start in range(0, N, BN):
            offs_n = start + tl.arange(0, BN)
            exists = exists_mask(
                present, present_stride, tower, offs_n, offs_n < N, EXISTS_FIRST, EXISTS_SECOND
            )
            items = offs_n.to(tl.int64)[:, None]
            at = x_at + items * width + offs_x[None, :]
            x = tl.load(at, mask=exists[:, None] & mask_x[None, :], other=0)
            a = tl.load(a_at + items * (L * BR), mask=(offs_n < N)[:, None], other=0)
            acc = dot(tl.trans(x), a, acc, PRECISION)
        to = products + row.to(tl.int64)[:, None] * (L * BR) + (level * BR + offs_r)[None, :]
        store_sum(to, acc, mask_x[:, None], ACCUMULATE)


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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
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
    offs_d = chunk * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_d = offs_d < D
    mask_w = (offs_r < R)[:, None] & mask_d[None, :]
    index = pick_constant(TOWERS, tower)
    coef += index * L * K
    carry += index * L
    DEPTH: tl.constexpr = product_depth(BR)
    offs_p = tl.arange(0, DEPTH)
    down = pick(down_weight, tower) + offs_p[:, None] * D + offs_d[None, :]  # [DEPTH, BD]
    bias = pick(up_bias, tower) + offs_d
    g_columns = pick(grad_out, tower) + offs_d
    part = partial + share.to(tl.int64) * (L * R * D) + offs_r[:, None] * D + offs_d[None, :]
    dw = ()  # [BR, BD] a level
    for _ in tl.static_range(COUNT):
        dw = dw + (tl.zeros((BR, BD), tl.float32),)
    # A number a thread for each level and gate, added up over threads only at the end.
    gates = ()
    if FIRST == 0:
        for _ in tl.static_range(L * (K + 1)):
            gates = gates + (tl.zeros((BN, BD // BV), tl.float32),)
    program = (tl.program_id(2) * tl.num_programs(1) + chunk) * tl.num_programs(0) + tower
    dx_at = dx_rows + program.to(tl.int64) * (L * BN * BD)
    dx_at += (tl.arange(0, BN) * BD)[:, None] + tl.arange(0, BD)[None, :]  # [BN, BD]
    begin = tl.program_id(2) * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    for start in range(begin, end, BN):
        offs_n = start + tl.arange(0, BN)
        mask_n = offs_n < end
        rows = offs_n.to(tl.int64)
        grad_z_rows = grad_z + ((tower.to(tl.int64) * N + rows) * L * BR)[:, None]
        if FIRST == 0:
            tl.debug_barrier()  # the block before has been read
            exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
            mask_g = exists[:, None] & mask_d[None, :]
            dh = tl.load(rows[:, None] * D + g_columns[None, :], mask=mask_g, other=0).to(tl.float32)
            for level in tl.static_range(L - 1, -1, -1):
                dx = dh
                for r in range(0, BR, DEPTH):
                    at_r = level * BR + r + offs_p
                    dz = tl.load(grad_z_rows + at_r[None, :], mask=mask_n[:, None], other=0)
                    mask_p = (r + offs_p < R)[:, None] & mask_d[None, :]
                    dx = dot(dz, tl.load(down + (level * R + r) * D, mask=mask_p, other=0), dx, PRECISION)
                dh = dx * tl.load(carry + level)
                dx = narrow(dx, grad_z.dtype.element_ty)
                tl.store(dx_at + level * (BN * BD), dx)
                if grad_x is not None:
                    to = pick(grad_x, tower) + (rows * (L * D))[:, None] + (level * D + offs_d)[None, :]
                    tl.store(to, dx, mask=mask_n[:, None] & mask_d[None, :])
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
            offs_n,
            mask_n,
            SLOTS,
            COLUMNS,
            GATHERED,
            K,
            STATIC,
        )
        pointers, masks, strides, scale_pointers = sources
        u = tl.zeros((BN, BD), tl.float32)
        tiles = read_level(pointers, masks, offs_d, mask_d, K)
        dw_next = ()
        gates_next = ()
        for level in tl.static_range(L if FIRST == 0 else FIRST + COUNT):
            current = tiles
            if level + 1 < (L if FIRST == 0 else FIRST + COUNT):  # in flight behind this level's products
                pointers = advance(pointers, strides, K)
                tiles = read_level(pointers, masks, offs_d, mask_d, K)
            x = u * tl.load(carry + level)
            if FIRST == 0:
                dx = tl.load(dx_at + level * (BN * BD)).to(tl.float32)
            for k in tl.static_range(K):
                value = source_value(current, scale_pointers, masks, level, k)
                if FIRST == 0:
                    gates_next = gates_next + (
                        gates[level * (K + 1) + k] + thread_sums(dx * value, BN, BD, BV),
                    )
                x += value * tl.load(coef + level * K + k)
            if FIRST == 0:
                gates_next = gates_next + (gates[level * (K + 1) + K] + thread_sums(dx * u, BN, BD, BV),)
            if level >= FIRST and level < FIRST + COUNT:
                dz = tl.load(grad_z_rows + level * BR + offs_r[None, :], mask=mask_n[:, None], other=0)
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
            at = gate_partial + program * (L * (K + 1)) + j
            store_sum(at, tl.sum(tl.sum(gates[j], 1), 0), None, ACCUMULATE)


@triton.jit
def thread_sums(x, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """[BN, BD / BV]: sums of BV columns side by side, which one thread holds: nothing is exchanged."""
    return tl.sum(tl.reshape(x, (BN, BD // BV, BV)), 2)


@triton.jit
def store_sum(at, value, mask, ACCUMULATE: tl.constexpr):
    """Write a program's share, or add it to what the chunk of items before left there."""
    if ACCUMULATE:
        value += tl.load(at, mask=mask)
    tl.store(at, value, mask=mask)
