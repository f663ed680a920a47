# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Backward kernels of the side network (kernels/README.md has the algebra and the tiling).

In the notation of side_network_forward.py, with g the gradient of h_L:

    da_l = κ_{L,l} W_up,lᵀ g + Σ_{q>l} G[q, l]ᵀ dz_q,    dz_l = da_l · act'(z_l)            (*grad_walk*)
    dx_l = dh_l + W_down,lᵀ dz_l,    dh_{l−1} = carry_l·dx_l,    dh_{L−1} = g
    dW_down,l = Σ dz_l x_lᵀ,  dW_up,l = Σ dh_l a_lᵀ,  dcoef_{l,k} = Σ ⟨dx_l, source_k⟩
    dcarry_l = Σ ⟨dx_l, h_{l−1}⟩

The lines after the first need no other columns of D than their own: one program owns a chunk of columns of
one tower and a range of items, walks the levels down for dx (*up_gradient*) or down for dx and up for x,
from cache and activations without any down-projection (*down_gradient*), and keeps its share of the
weights' gradients in registers. Shares are summed in a fixed order afterwards: no atomics, the same bits
every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import activate, activate_grad, dot, narrow, pick, pick_constant
from crossan_fast.kernels.side_network_forward import tanh
from crossan_fast.kernels.side_network_tiles import exists_mask, open_sources, read_level, source_value


@triton.jit
def grad_down_levels(
    grad_out,
    up_weight,
    offs_n,
    exists,
    begin,
    end,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_up,lᵀ g of levels FIRST … over columns [begin, end): a tuple of [BN, BR] in fp32."""
    offs_r = tl.arange(0, BR)
    mask_r = offs_r < R
    e = ()
    for _ in tl.static_range(COUNT):
        e = e + (tl.zeros((BN, BR), tl.float32),)
    rows = grad_out + offs_n.to(tl.int64) * D
    for d in range(begin, end, BD):
        offs_d = d + tl.arange(0, BD)
        mask_d = offs_d < D
        g = tl.load(rows[:, None] + offs_d[None, :], mask=exists[:, None] & mask_d[None, :], other=0)
        e_next = ()
        for i in tl.static_range(COUNT):
            weight = tl.load(  # [BD, BR]
                up_weight + (FIRST + i) * D * R + offs_d[:, None] * R + offs_r[None, :],
                mask=mask_d[:, None] & mask_r[None, :],
                other=0,
            )
            e_next = e_next + (dot(g, weight, e[i], PRECISION),)
        e = e_next
    return e


@triton.jit
def grad_down_kernel(
    grad_out,
    up_weight,
    present,
    present_stride,
    partial,
    N,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products with g alone, for SPAN columns a program: partial [splits, T, N, L, BR]."""
    tower = tl.program_id(0)
    split = tl.program_id(2)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < N
    begin = split * SPAN
    e = grad_down_levels(
        pick(grad_out, tower),
        pick(up_weight, tower),
        offs_n,
        exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND),
        begin,
        tl.minimum(begin + SPAN, D),
        FIRST,
        COUNT,
        D,
        R,
        BN,
        BD,
        BR,
        PRECISION,
    )
    row = (split * tl.num_programs(0) + tower).to(tl.int64) * N + offs_n
    at = partial + (row * L * BR)[:, None] + tl.arange(0, BR)[None, :]
    for i in tl.static_range(COUNT):
        tl.store(at + (FIRST + i) * BR, e[i], mask=mask_n[:, None])


@triton.jit
def grad_walk_kernel(
    grad_out,
    up_weight,
    partial,
    mixing,
    carry,
    saved,
    grad_z,
    activations,
    present,
    present_stride,
    N,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    SPLITS: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz and a, [T, N, L, BR] in the compute dtype; SPLITS = 0 forms the products with g here as well."""
    tower = tl.program_id(0)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    offs_r = tl.arange(0, BR)
    mask_n = offs_n < N
    mask_r = offs_r < R
    index = pick_constant(TOWERS, tower).to(tl.int64)
    exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    at = ((tower.to(tl.int64) * N + offs_n) * L * BR)[:, None] + offs_r[None, :]
    e = ()
    if SPLITS == 0:
        e = grad_down_levels(
            pick(grad_out, tower),
            pick(up_weight, tower),
            offs_n,
            exists,
            0,
            D,
            0,
            L,
            D,
            R,
            BN,
            BD,
            BR,
            PRECISION,
        )
    else:
        split_stride = tl.num_programs(0).to(tl.int64) * N * L * BR
        for level in tl.static_range(L):
            total = tl.zeros((BN, BR), tl.float32)
            for split in range(SPLITS):
                total += tl.load(
                    partial + split * split_stride + at + level * BR, mask=mask_n[:, None], other=0.0
                )
            e = e + (total,)
    mixing += index * (L * (L - 1) // 2 * BR * BR)
    tile = offs_r[:, None] * BR + offs_r[None, :]  # [r of z, r of a]
    z_rows = pick(saved, tower) + (offs_n.to(tl.int64) * L * R)[:, None] + offs_r[None, :]
    tail = tl.full((), 1.0, tl.float32)  # κ_{L,l}
    grads = ()  # dz of the levels above, the last first
    for level in tl.static_range(L - 1, -1, -1):
        da = e[level] * tail
        tail *= tl.load(carry + index * L + level)
        for above in tl.static_range(L - 1, level, -1):
            pair = above * (above - 1) // 2 + level
            da = dot(grads[L - 1 - above], tl.load(mixing + pair * BR * BR + tile), da, PRECISION)
        z = tl.load(z_rows + level * R, mask=exists[:, None] & mask_r[None, :], other=0).to(tl.float32)
        dz = narrow(da * activate_grad(z, GELU), grad_z.dtype.element_ty)
        tl.store(grad_z + at + level * BR, dz, mask=mask_n[:, None])
        a = narrow(activate(z, GELU), activations.dtype.element_ty)
        tl.store(activations + at + level * BR, a, mask=mask_n[:, None])
        grads = grads + (dz,)


@triton.jit
def up_gradient_kernel(
    carry,
    down_weight,
    grad_out,
    grad_z,
    activations,
    partial,
    sum_partial,
    grad_x,
    present,
    present_stride,
    N,
    ITEMS,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_up of levels FIRST … FIRST + COUNT − 1: a chunk of columns, ITEMS items of a tower, levels down.

    partial [splits, T, 2, L·R·D] (down as [L, R, D], up as [L, D, R]); with FIRST = 0 also sum_partial
    [splits, T, D] (Σ g) and, unless None, grad_x: per tower [N, L, D].
    """
    tower = tl.program_id(0)
    split = tl.program_id(2)
    share = split * tl.num_programs(0) + tower
    offs_d = tl.program_id(1) * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_d = offs_d < D
    mask_w = (offs_r < R)[:, None] & mask_d[None, :]
    carry += pick_constant(TOWERS, tower) * L
    down = pick(down_weight, tower) + offs_r[:, None] * D + offs_d[None, :]  # [BR, BD]
    g_columns = pick(grad_out, tower) + offs_d
    dw = ()  # [BR, BD] a level, the last first
    for _ in tl.static_range(COUNT):
        dw = dw + (tl.zeros((BR, BD), tl.float32),)
    g_sum = tl.zeros((BD,), tl.float32)
    begin = split * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    for start in range(begin, end, BN):
        offs_n = start + tl.arange(0, BN)
        mask_n = offs_n < end
        rows = offs_n.to(tl.int64)
        exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
        at = ((tower.to(tl.int64) * N + rows) * L * BR)[:, None] + offs_r[None, :]
        g = tl.load(rows[:, None] * D + g_columns[None, :], mask=exists[:, None] & mask_d[None, :], other=0)
        dh = g.to(tl.float32)
        if FIRST == 0:
            g_sum += tl.sum(dh, 0)
        dw_next = ()
        for level in tl.static_range(L - 1, -1, -1):
            if level >= FIRST:
                if level < FIRST + COUNT:
                    a = tl.load(activations + at + level * BR, mask=mask_n[:, None], other=0)
                    total = dot(tl.trans(a), narrow(dh, a.dtype), dw[FIRST + COUNT - 1 - level], PRECISION)
                    dw_next = dw_next + (total,)
                if level > FIRST or grad_x is not None:
                    dz = tl.load(grad_z + at + level * BR, mask=mask_n[:, None], other=0)
                    w = tl.load(down + level * R * D, mask=mask_w, other=0)
                    dx = dot(dz, w, dh, PRECISION)
                    if grad_x is not None and FIRST == 0:
                        tl.store(
                            pick(grad_x, tower) + (rows * (L * D))[:, None] + (level * D + offs_d)[None, :],
                            narrow(dx, dz.dtype),
                            mask=mask_n[:, None] & mask_d[None, :],
                        )
                    dh = dx * tl.load(carry + level)
        dw = dw_next
    part = partial + share.to(tl.int64) * (2 * L * R * D) + L * R * D
    for level in tl.static_range(FIRST, FIRST + COUNT):
        to = part + level * R * D + offs_d[None, :] * R + offs_r[:, None]
        store_sum(to, dw[FIRST + COUNT - 1 - level], mask_w, ACCUMULATE)
    if FIRST == 0:
        store_sum(sum_partial + share * D + offs_d, g_sum, mask_d, ACCUMULATE)


@triton.jit
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
    up_weight,
    up_bias,
    grad_out,
    grad_z,
    activations,
    partial,
    dx_rows,
    gate_rows,
    gate_partial,
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
    PRECISION: tl.constexpr,
):
    """dW_down of levels FIRST … FIRST + COUNT − 1: a chunk of columns, ITEMS items of a tower, levels up.

    partial as in `up_gradient_kernel`. With FIRST = 0 also the gates: dx of all levels is formed first,
    downwards, and gate_partial [splits, chunks, T, L, K + 1] receives Σ ⟨dx_l, source_k⟩, then Σ ⟨dx_l,
    h_{l−1}⟩. A block's dx waits in dx_rows [programs, L, BN, BD], the L·(K + 1) sums a row in gate_rows
    [programs, L·(K + 1), BN]: a few kB that a program rewrites block after block and that stay in cache;
    registers are the weights' shares'.
    """
    tower = tl.program_id(0)
    chunk = tl.program_id(1)
    split = tl.program_id(2)
    towers = tl.num_programs(0)
    offs_d = chunk * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_d = offs_d < D
    mask_w = (offs_r < R)[:, None] & mask_d[None, :]
    index = pick_constant(TOWERS, tower)
    coef += index * L * K
    carry += index * L
    down = pick(down_weight, tower) + offs_r[:, None] * D + offs_d[None, :]  # [BR, BD]
    up = pick(up_weight, tower) + offs_d[None, :] * R + offs_r[:, None]  # [BR, BD]
    bias = pick(up_bias, tower) + offs_d
    g_columns = pick(grad_out, tower) + offs_d
    gate_at = (split * tl.num_programs(1) + chunk) * towers + tower
    dx_at = (tl.arange(0, BN) * BD)[:, None] + tl.arange(0, BD)[None, :]
    dx_at += dx_rows + gate_at.to(tl.int64) * (L * BN * BD)
    row_sums = gate_rows + gate_at.to(tl.int64) * (L * (K + 1) * BN)
    dw = ()
    for _ in tl.static_range(COUNT):
        dw = dw + (tl.zeros((BR, BD), tl.float32),)
    begin = split * ITEMS
    end = tl.minimum(begin + ITEMS, N)
    for start in range(begin, end, BN):
        offs_n = start + tl.arange(0, BN)
        mask_n = offs_n < end
        rows = offs_n.to(tl.int64)
        at = ((tower.to(tl.int64) * N + rows) * L * BR)[:, None] + offs_r[None, :]
        if FIRST == 0:
            tl.debug_barrier()  # the block before has been read
            exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
            g = tl.load(
                rows[:, None] * D + g_columns[None, :], mask=exists[:, None] & mask_d[None, :], other=0
            )
            dh = g.to(tl.float32)
            for level in tl.static_range(L - 1, -1, -1):
                dz = tl.load(grad_z + at + level * BR, mask=mask_n[:, None], other=0)
                w = tl.load(down + level * R * D, mask=mask_w, other=0)
                dx = dot(dz, w, dh, PRECISION)
                tl.store(dx_at + level * (BN * BD), narrow(dx, dz.dtype))
                dh = dx * tl.load(carry + level)
            tl.debug_barrier()  # written by other threads of this program, as were the row sums
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
        h = tl.zeros((BN, BD), tl.float32)
        tiles = read_level(pointers, masks, strides, 0, offs_d, mask_d, K)
        dw_next = ()
        for level in tl.static_range(L if FIRST == 0 else FIRST + COUNT):
            current = tiles
            if level + 1 < (L if FIRST == 0 else FIRST + COUNT):  # in flight behind this level's products
                tiles = read_level(pointers, masks, strides, level + 1, offs_d, mask_d, K)
            x = h * tl.load(carry + level)
            if FIRST == 0:
                dx = tl.load(dx_at + level * (BN * BD)).to(tl.float32)
                add_rows(row_sums + (level * (K + 1) + K) * BN, dx * h, start > begin, BN)
            for k in tl.static_range(K):
                value = source_value(current, scale_pointers, masks, level, k)
                if FIRST == 0:
                    add_rows(row_sums + (level * (K + 1) + k) * BN, dx * value, start > begin, BN)
                x += value * tl.load(coef + level * K + k)
            if level >= FIRST and level < FIRST + COUNT:
                dz = tl.load(grad_z + at + level * BR, mask=mask_n[:, None], other=0)
                dw_next = dw_next + (dot(tl.trans(dz), narrow(x, dz.dtype), dw[level - FIRST], PRECISION),)
            if level + 1 < (L if FIRST == 0 else FIRST + COUNT):
                a = tl.load(activations + at + level * BR, mask=mask_n[:, None], other=0)
                w = tl.load(up + level * D * R, mask=mask_w, other=0)
                h = dot(a, w, x, PRECISION)
                h += tl.load(bias + level * D, mask=mask_d, other=0).to(tl.float32)[None, :]
        dw = dw_next
    part = partial + (split * towers + tower).to(tl.int64) * (2 * L * R * D)
    for level in tl.static_range(FIRST, FIRST + COUNT):
        to = part + level * R * D + offs_r[:, None] * D + offs_d[None, :]
        store_sum(to, dw[level - FIRST], mask_w, ACCUMULATE)
    if FIRST == 0:
        tl.debug_barrier()
        for j in range(L * (K + 1)):
            offs = tl.arange(0, BN)
            sums = tl.load(row_sums + j * BN + offs, mask=offs < tl.where(begin < end, BN, 0), other=0.0)
            store_sum(gate_partial + gate_at * (L * (K + 1)) + j, tl.sum(sums, 0), None, ACCUMULATE)


@triton.jit
def add_rows(at, product, CONTINUED, BN: tl.constexpr):
    """at[0 … BN) = Σ over columns of `product` [BN, BD], plus what lies there if CONTINUED."""
    offs = tl.arange(0, BN)
    before = tl.load(at + offs, mask=offs < tl.where(CONTINUED, BN, 0), other=0.0)
    tl.store(at + offs, before + tl.sum(product, 1))


@triton.jit
def store_sum(at, value, mask, ACCUMULATE: tl.constexpr):
    """Write a program's share, or add it to what the chunk of items before left there."""
    if ACCUMULATE:
        value += tl.load(at, mask=mask)
    tl.store(at, value, mask=mask)


@triton.jit
def reduce_kernel(partial, down_grad, up_grad, SIZE, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """dW_down and dW_up of every tower: the shares summed in order, in the weights' dtypes."""
    tower = tl.program_id(0)
    which = tl.program_id(1)
    offs = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    towers = tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        at = ((split * towers + tower) * 2 + which).to(tl.int64) * SIZE
        total += tl.load(partial + at + offs, mask=mask, other=0.0)
    if which == 0:
        target = pick(down_grad, tower) + offs
        tl.store(target, narrow(total, target.dtype.element_ty), mask=mask)
    else:
        target_up = pick(up_grad, tower) + offs
        tl.store(target_up, narrow(total, target_up.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    sum_partial,
    gate_partial,
    z_sum,
    carry,
    down_weight,
    down_bias_grad,
    up_bias_grad,
    gate_sum,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    TOWERS: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """Bias gradients from Σ g and Σ dz (their recursion is linear), and the gates' sums [T, L, K + 1]."""
    tower = tl.program_id(0)
    chunk = tl.program_id(1)
    towers = tl.num_programs(0)
    index = pick_constant(TOWERS, tower)
    offs_d = chunk * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_d = offs_d < D
    mask_r = offs_r < R
    ds = tl.zeros((BD,), tl.float32)
    for split in range(SPLITS):
        ds += tl.load(sum_partial + (split * towers + tower) * D + offs_d, mask=mask_d, other=0.0)
    down = pick(down_weight, tower)
    up_at = pick(up_bias_grad, tower)
    down_at = pick(down_bias_grad, tower)
    for i in range(L):
        level = L - 1 - i
        tl.store(up_at + level * D + offs_d, narrow(ds, up_at.dtype.element_ty), mask=mask_d)
        dz = tl.load(z_sum + (tower * L + level) * BR + offs_r)
        w = tl.load(
            down + level * R * D + offs_r[:, None] * D + offs_d[None, :],
            mask=mask_r[:, None] & mask_d[None, :],
            other=0,
        )
        ds = (ds + tl.sum(w.to(tl.float32) * dz[:, None], 0)) * tl.load(carry + index * L + level)
        if chunk == 0:
            tl.store(down_at + level * R + offs_r, narrow(dz, down_at.dtype.element_ty), mask=mask_r)
    if chunk == 0:
        offs_g = tl.arange(0, BG)
        mask_g = offs_g < L * (K + 1)
        total = tl.zeros((BG,), tl.float32)
        for part in range(PARTS):
            at = gate_partial + (part * towers + tower) * (L * (K + 1))
            total += tl.load(at + offs_g, mask=mask_g, other=0.0)
        tl.store(gate_sum + index * (L * (K + 1)) + offs_g, total, mask=mask_g)


@triton.jit
def gate_gradient_kernel(
    gates,
    cross_gates,
    gate_sum,
    gate_grads,
    cross_gate_grads,
    inverse_temperature,
    KINDS: tl.constexpr,
    PAIRED: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    BL: tl.constexpr,
):
    """Through sigmoid and tanh: what `coefficients_kernel` computed, backwards. One program."""
    level = tl.arange(0, BL)
    mask = level < L
    for t in tl.static_range(len(gates)):
        sums = gate_sum + (t * L + level) * (K + 1)
        dmu = tl.zeros((BL,), tl.float32)
        if not PAIRED[t]:
            dmu -= tl.load(sums + K, mask=mask, other=0.0)
        for k in tl.static_range(K):
            grad = tl.load(sums + k, mask=mask, other=0.0)
            if KINDS[t * K + k] == -1:
                dmu += grad
            elif KINDS[t * K + k] == -2:
                dmu -= grad
            elif KINDS[t * K + k] >= 0:
                value = tanh(tl.load(cross_gates[KINDS[t * K + k]] + level, mask=mask, other=0.0))
                to = cross_gate_grads[KINDS[t * K + k]]
                tl.store(to + level, narrow(grad * (1.0 - value * value), to.dtype.element_ty), mask=mask)
        theta = tl.load(gates[t] + level, mask=mask, other=0.0).to(tl.float32)
        mu = tl.sigmoid(theta * inverse_temperature)
        dtheta = dmu * mu * (1.0 - mu) * inverse_temperature
        tl.store(gate_grads[t] + level, narrow(dtheta, gate_grads[t].dtype.element_ty), mask=mask)
