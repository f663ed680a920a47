# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Weight gradients' kernels of the side network: sums over items only (kernels/README.md has the algebra).

In the notation of backward_kernels.py, dz_L = ge among the dz_l: what reads an h at level l sees u_l, images
of activations and of biases; so Σ dz_l h_lᵀ needs, beside Σ dz_l u_lᵀ (*down_gradient*), no more than the
small matrices Σ dz_l a_pᵀ, which are the gradients of G (*mixing_gradient*, a plain product), and Σ dz_l.
Weights multiply these once a call and not once an item (finish_kernels.py). Every sum has one owner or is
added up in a fixed order: no atomics, the same bits every time.
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
    open_sources,
    read_level,
    source_value,
)


@triton.jit(do_not_specialize=["N", "ITEMS"])
def mixing_gradient_kernel(
    grad_z,
    activations,
    products,
    sums,
    N,
    ITEMS,
    ACCUMULATE: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ dz_l a_pᵀ of every l > p and Σ dz_l: products [splits, T, ROW, L·BR] and sums [splits, T, ROW], fp32.

    A program owns BX rows of one p's columns, for ITEMS items. Tiles without an l above p are not formed.
    Programs of p = L sum dz itself, for the biases.
    """
    ROW: tl.constexpr = L * BLOCK_R + BLOCK_E
    tower = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_X
    level = tl.program_id(2) % (L + 1)
    split = tl.program_id(2) // (L + 1)
    index_x = first + tl.arange(0, BLOCK_X)
    mask_x = index_x < ROW
    share = (split * tl.num_programs(0) + tower) * ROW + index_x
    begin = split * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    base = tower.to(tl.int64) * N
    if level == L:
        total = tl.zeros((BLOCK_X,), tl.float32)
        for start in range(begin, end, BLOCK_N):
            index_n = start + tl.arange(0, BLOCK_N)
            pointer = grad_z + (base + index_n)[:, None] * ROW + index_x[None, :]
            x = tl.load(pointer, mask=(index_n < end)[:, None] & mask_x[None, :], other=0)  # [BN, BX]
            total += tl.sum(x.to(tl.float32), 0)
        store_sum(sums + share, total, mask_x, ACCUMULATE)
    elif first + BLOCK_X > (level + 1) * BLOCK_R:
        index_r = tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_X, BLOCK_R), tl.float32)  # [BX, BR]
        for start in range(begin, end, BLOCK_N):
            index_n = start + tl.arange(0, BLOCK_N)
            mask_n = index_n < end
            row = (base + index_n)[:, None]
            pointer = grad_z + row * ROW + index_x[None, :]
            x = tl.load(pointer, mask=mask_n[:, None] & mask_x[None, :], other=0)  # [BN, BX]
            pointer = activations + row * (L * BLOCK_R) + (level * BLOCK_R + index_r)[None, :]
            a = tl.load(pointer, mask=mask_n[:, None], other=0)  # [BN, BR]
            acc = dot(tl.trans(x), a, acc, PRECISION)
        pointer = (
            products + share.to(tl.int64)[:, None] * (L * BLOCK_R) + (level * BLOCK_R + index_r)[None, :]
        )
        store_sum(pointer, acc, mask_x[:, None], ACCUMULATE)


@triton.jit
def state_gradients(
    dz_rows,
    down,
    head,
    carry,
    dx_pointer,
    grad_x,
    mask_n,
    mask_d,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of a block's levels, downwards from W_headᵀ ge, to `dx_pointer`; and to `grad_x` unless None.

    `down` and `head` point at this chunk of D in row 0, [1, BD]; `grad_x` at each item's level 0, [BN, BD].
    """
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    DEPTH_E: tl.constexpr = product_depth(BLOCK_E)
    index_p = tl.arange(0, DEPTH)
    dh = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BN, BD]
    for e in range(0, BLOCK_E, DEPTH_E):
        index_e = e + tl.arange(0, DEPTH_E)
        ge = tl.load(dz_rows + L * BLOCK_R + index_e[None, :], mask=mask_n[:, None], other=0)
        mask_w = (index_e < E)[:, None] & mask_d[None, :]
        dh = dot(ge, tl.load(head + index_e[:, None] * D, mask=mask_w, other=0), dh, PRECISION)
    for level in tl.static_range(L - 1, -1, -1):
        dx = dh
        for r in range(0, BLOCK_R, DEPTH):
            index_r = r + index_p
            dz = tl.load(  # [BN, DEPTH]
                dz_rows + level * BLOCK_R + index_r[None, :], mask=mask_n[:, None], other=0
            )
            mask_w = (index_r < R)[:, None] & mask_d[None, :]
            weight = tl.load(down + (level * R + index_r)[:, None] * D, mask=mask_w, other=0)
            dx = dot(dz, weight, dx, PRECISION)
        dh = dx * tl.load(carry + level)
        dx = narrow(dx, dx_pointer.dtype.element_ty)  # [BN, BD]
        tl.store(dx_pointer + level * (BLOCK_N * BLOCK_D), dx)
        if grad_x is not None:
            tl.store(grad_x + level * D, dx, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["N", "ITEMS"])
def down_gradient_kernel(
    read,
    presence,
    gates,
    readers,
    grad_z,
    shares,
    dx_rows,
    grad_x,
    N,
    ITEMS,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ dz_l u_lᵀ of levels FIRST … FIRST + COUNT − 1: a chunk of columns, ITEMS items of a tower.

    partial [splits, T, L·R + E, D], with Σ ge u_Lᵀ where the last level is among them. With FIRST = 0 dx of
    all levels is formed first, downwards, for the gates: gate_partial [splits, chunks, T, L, K + 1] receives
    Σ ⟨dx_l, source_k⟩, then Σ ⟨dx_l, u_{l−1}⟩, and grad_x (per tower [N, L, D]), unless None, dx. A block's
    dx waits in dx_rows [programs, L, BN, BD], a few kB that a program rewrites block after block and that
    stay in cache: it comes in a product's register layout, and meets states in theirs.
    """
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    K: tl.constexpr = SIZES[4]
    TOWERS: tl.constexpr = GROUP[0]
    LAST: tl.constexpr = FIRST + COUNT == L
    coef, carry = gates
    partial, gate_partial = shares
    tower = tl.program_id(0)
    chunk = tl.program_id(1)
    share = tl.program_id(2) * tl.num_programs(0) + tower
    index_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    index_r = tl.arange(0, BLOCK_R)
    index_e = tl.arange(0, BLOCK_E)
    mask_d = index_d < D
    index = pick_constant(TOWERS, tower)
    coef += index * L * K
    carry += index * L
    down = pick(readers[0], tower) + index_d[None, :]
    head = pick(readers[1], tower) + index_d[None, :]
    part = partial + share.to(tl.int64) * ((L * R + E) * D) + index_d[None, :]
    dw = ()  # [BR, BD] a level, and [BE, BD]
    for _ in tl.static_range(COUNT):
        dw = dw + (tl.zeros((BLOCK_R, BLOCK_D), tl.float32),)
    if LAST:
        dw = dw + (tl.zeros((BLOCK_E, BLOCK_D), tl.float32),)
    # A number a thread for each level and gate, added up over threads only at the end.
    sums = ()
    if FIRST == 0:
        for _ in tl.static_range(L * (K + 1)):
            sums = sums + (tl.zeros((BLOCK_N, BLOCK_D // BLOCK_V), tl.float32),)
    program = (tl.program_id(2) * tl.num_programs(1) + chunk) * tl.num_programs(0) + tower
    dx_pointer = dx_rows + program.to(tl.int64) * (L * BLOCK_N * BLOCK_D)
    dx_pointer += (tl.arange(0, BLOCK_N) * BLOCK_D)[:, None] + tl.arange(0, BLOCK_D)[None, :]  # [BN, BD]
    begin = tl.program_id(2) * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    for start in range(begin, end, BLOCK_N):
        index_n = start + tl.arange(0, BLOCK_N)
        mask_n = index_n < end
        rows = index_n.to(tl.int64)
        dz_rows = grad_z + ((tower.to(tl.int64) * N + rows) * (L * BLOCK_R + BLOCK_E))[:, None]
        if FIRST == 0:
            x_pointer = None
            if grad_x is not None:
                x_pointer = pick(grad_x, tower) + (rows * (L * D))[:, None] + index_d[None, :]
            tl.debug_barrier()  # the block before has been read
            state_gradients(
                dz_rows,
                down,
                head,
                carry,
                dx_pointer,
                x_pointer,
                mask_n,
                mask_d,
                SIZES,
                BLOCK_N,
                BLOCK_D,
                BLOCK_R,
                BLOCK_E,
                PRECISION,
            )
            tl.debug_barrier()  # written by other threads of this program
        sources = open_sources(read, presence, tower, index_n, mask_n, GROUP, K)
        pointers, masks, strides, scale_pointers = sources
        u = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BN, BD]
        tiles = read_level(pointers, masks, index_d, mask_d, K)
        dw_next = ()
        sums_next = ()
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
                    sums_next = sums_next + (
                        sums[level * (K + 1) + k] + thread_sums(dx * value, BLOCK_N, BLOCK_D, BLOCK_V),
                    )
                x += value * tl.load(coef + level * K + k)
            if FIRST == 0:
                sums_next = sums_next + (
                    sums[level * (K + 1) + K] + thread_sums(dx * u, BLOCK_N, BLOCK_D, BLOCK_V),
                )
            u = x
            if level >= FIRST and level < FIRST + COUNT:
                dz = tl.load(dz_rows + level * BLOCK_R + index_r[None, :], mask=mask_n[:, None], other=0)
                dw_next = dw_next + (dot(tl.trans(dz), narrow(u, dz.dtype), dw[level - FIRST], PRECISION),)
            # Keeps loads of several levels from waiting in registers at once.
            tl.debug_barrier()
        if LAST:
            ge = tl.load(dz_rows + L * BLOCK_R + index_e[None, :], mask=mask_n[:, None], other=0)
            dw_next = dw_next + (dot(tl.trans(ge), narrow(u, ge.dtype), dw[COUNT], PRECISION),)
        dw = dw_next
        sums = sums_next
    for level in tl.static_range(FIRST, FIRST + COUNT):
        mask_w = (index_r < R)[:, None] & mask_d[None, :]
        store_sum(part + (level * R + index_r)[:, None] * D, dw[level - FIRST], mask_w, ACCUMULATE)
    if LAST:
        mask_w = (index_e < E)[:, None] & mask_d[None, :]
        store_sum(part + (L * R + index_e)[:, None] * D, dw[COUNT], mask_w, ACCUMULATE)
    if FIRST == 0:
        for j in tl.static_range(L * (K + 1)):
            pointer = gate_partial + program * (L * (K + 1)) + j
            store_sum(pointer, tl.sum(tl.sum(sums[j], 1), 0), None, ACCUMULATE)


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
