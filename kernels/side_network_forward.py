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

from crossan_fast.kernels._common import activate, dot, narrow, pick, pick_constant
from crossan_fast.kernels.side_network_tiles import exists_mask, mix, open_sources, read_level


@triton.jit
def coefficients_kernel(
    gates,
    cross_gates,
    coef,
    carry,
    inverse_temperature,
    KINDS: tl.constexpr,
    PAIRED: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    BL: tl.constexpr,
):
    """coef [T, L, K] and carry [T, L] (fp32) of all gates. One program: these are a few hundred numbers.

    KINDS[t·K + k]: −1 μ, −2 1 − μ, −3 no such source, n ≥ 0 tanh(cross_gates[n]). PAIRED[t]: carry 1.
    """
    level = tl.arange(0, BL)
    mask = level < L
    for t in tl.static_range(len(gates)):
        theta = tl.load(gates[t] + level, mask=mask, other=0.0).to(tl.float32)
        mu = tl.sigmoid(theta * inverse_temperature)
        tl.store(carry + t * L + level, 1.0 if PAIRED[t] else 1.0 - mu, mask=mask)
        for k in tl.static_range(K):
            if KINDS[t * K + k] == -1:
                value = mu
            elif KINDS[t * K + k] == -2:
                value = 1.0 - mu
            elif KINDS[t * K + k] == -3:
                value = tl.zeros_like(mu)
            else:
                value = tanh(tl.load(cross_gates[KINDS[t * K + k]] + level, mask=mask, other=0.0))
            tl.store(coef + (t * L + level) * K + k, value, mask=mask)


@triton.jit
def tanh(x):
    """fp32 tanh; near 0, where gates start, by its series, which keeps what 2·sigmoid − 1 loses."""
    x = x.to(tl.float32)
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(s < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def mixing_kernel(
    down_weight,
    up_weight,
    carry,
    mixing,
    WIDTHS: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G [T, L(L−1)/2, BR, BR], pair (l, p) at l(l−1)/2 + p, zero beyond R. A program: one BT × BT tile.

    ALIGNED: every width is a multiple of 16, so that rows can be read 16 bytes at a time.
    """
    pair = tl.program_id(0)
    tower = tl.program_id(1)
    tile = tl.program_id(2)
    later = tl.full((), 1, tl.int32)
    while later * (later + 1) // 2 <= pair:
        later += 1
    earlier = pair - later * (later - 1) // 2
    width = pick_constant(WIDTHS, tower)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    offs_i = (tile // (BR // BT)) * BT + tl.arange(0, BT)
    offs_j = (tile % (BR // BT)) * BT + tl.arange(0, BT)
    mask_i = offs_i < R
    mask_j = offs_j < R
    down = pick(down_weight, tower) + later.to(tl.int64) * R * width
    up = pick(up_weight, tower) + earlier.to(tl.int64) * R * width
    acc = tl.zeros((BT, BT), tl.float32)
    for d in range(0, width, BD):
        offs_d = d + tl.arange(0, BD)
        mask_d = offs_d < width
        a = tl.load(
            down + offs_i[:, None] * width + offs_d[None, :], mask=mask_i[:, None] & mask_d[None, :], other=0
        )
        b = tl.load(
            up + offs_d[:, None] * R + offs_j[None, :], mask=mask_d[:, None] & mask_j[None, :], other=0
        )
        acc = dot(a, b, acc, PRECISION)
    kappa = tl.full((), 1.0, tl.float32)
    for j in range(earlier + 1, later + 1):
        kappa *= tl.load(carry + tower * L + j)
    at = (tower.to(tl.int64) * (L * (L - 1) // 2) + pair) * BR * BR
    tl.store(
        mixing + at + offs_i[:, None] * BR + offs_j[None, :], narrow(acc * kappa, mixing.dtype.element_ty)
    )


@triton.jit
def down_levels(
    sources,
    coef,
    carry,
    down_weight,
    up_bias,
    out,
    offs_n,
    mask_n,
    begin,
    end,
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
    """W_down,l u_l of levels FIRST … FIRST + COUNT − 1 over columns [begin, end): fp32 [BN, BR] a level.

    Where the last level is among them, u_L is written to `out`. Tiles of the next level are read before the
    product of the present one, so that loads are in flight behind it: a multiprocessor's one program of 8
    warps has nothing else to hide them.
    """
    pointers, masks, strides, scale_pointers = sources
    offs_r = tl.arange(0, BR)
    mask_r = offs_r < R
    z = ()
    for _ in tl.static_range(COUNT):
        z = z + (tl.zeros((BN, BR), tl.float32),)
    offs_d = begin + tl.arange(0, BD)
    tiles = read_level(pointers, masks, strides, 0, offs_d, offs_d < end, K)
    for d in range(begin, end, BD):
        offs_d = d + tl.arange(0, BD)
        mask_d = offs_d < end
        u = tl.zeros((BN, BD), tl.float32)
        z_next = ()
        for level in tl.static_range(FIRST + COUNT):
            current = tiles
            if level >= FIRST:
                weight = tl.load(  # [BD, BR]
                    down_weight + level * R * D + offs_r[None, :] * D + offs_d[:, None],
                    mask=mask_r[None, :] & mask_d[:, None],
                    other=0,
                )
            if level + 1 < FIRST + COUNT:
                tiles = read_level(pointers, masks, strides, level + 1, offs_d, mask_d, K)
            else:
                tiles = read_level(pointers, masks, strides, 0, offs_d + BD, offs_d + BD < end, K)
            if level > 0:
                u = u * tl.load(carry + level)
            u = mix(u, current, scale_pointers, masks, coef, level, K)  # x_l without its up-projections
            if level >= FIRST:
                z_next = z_next + (dot(narrow(u, weight.dtype), weight, z[level - FIRST], PRECISION),)
            u += tl.load(up_bias + level * D + offs_d, mask=mask_d, other=0).to(tl.float32)[None, :]
        z = z_next
        if FIRST + COUNT == L:
            tl.store(
                out + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :],
                narrow(u, out.dtype.element_ty),
                mask=mask_n[:, None] & mask_d[None, :],
            )
    return z


@triton.jit
def walk_levels(
    z,
    mixing,
    down_bias,
    saved,
    offs_n,
    mask_n,
    exists,
    L: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish z level by level and save it; returns activations, [BN, BR] a level, in the compute dtype."""
    offs_r = tl.arange(0, BR)
    mask_r = offs_r < R
    tile = offs_r[:, None] + BR * offs_r[None, :]  # G transposed: [r of a, r of z]
    activations = ()
    for level in tl.static_range(L):
        pre = z[level]
        for p in tl.static_range(level):
            pair = level * (level - 1) // 2 + p
            pre = dot(activations[p], tl.load(mixing + pair * BR * BR + tile), pre, PRECISION)
        pre += tl.load(down_bias + level * R + offs_r, mask=mask_r, other=0).to(tl.float32)[None, :]
        pre = tl.where(exists[:, None], pre, 0.0)
        tl.store(
            saved + (offs_n.to(tl.int64)[:, None] * L + level) * R + offs_r[None, :],
            narrow(pre, saved.dtype.element_ty),
            mask=mask_n[:, None] & mask_r[None, :],
        )
        activations = activations + (narrow(activate(pre, GELU), mixing.dtype.element_ty),)
    return activations


@triton.jit
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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*down* alone, for SPAN columns a program: partial [splits, T, N, L, BR] and u_L in `out`."""
    tower = tl.program_id(0)
    split = tl.program_id(2)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < N
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
        offs_n,
        mask_n,
        SLOTS,
        COLUMNS,
        GATHERED,
        K,
        STATIC,
    )
    begin = split * SPAN
    z = down_levels(
        sources,
        coef + index * L * K,
        carry + index * L,
        pick(down_weight, tower),
        pick(up_bias, tower),
        pick(out, tower),
        offs_n,
        mask_n,
        begin,
        tl.minimum(begin + SPAN, D),
        FIRST,
        COUNT,
        L,
        D,
        R,
        K,
        BN,
        BD,
        BR,
        PRECISION,
    )
    row = (split * tl.num_programs(0) + tower).to(tl.int64) * N + offs_n
    at = partial + (row * L * BR)[:, None] + tl.arange(0, BR)[None, :]
    for level in tl.static_range(COUNT):
        tl.store(at + (FIRST + level) * BR, z[level], mask=mask_n[:, None])


@triton.jit
def walk_kernel(
    partial,
    mixing,
    down_bias,
    saved,
    activations,
    present,
    present_stride,
    N,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    SPLITS: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*walk* alone: sums the partial products in a fixed order, saves z, writes activations [T, N, L, BR]."""
    tower = tl.program_id(0)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < N
    index = pick_constant(TOWERS, tower).to(tl.int64)
    row = tower.to(tl.int64) * N + offs_n
    at = (row * L * BR)[:, None] + tl.arange(0, BR)[None, :]
    split_stride = tl.num_programs(0).to(tl.int64) * N * L * BR
    z = ()
    for level in tl.static_range(L):
        total = tl.zeros((BN, BR), tl.float32)
        for split in range(SPLITS):
            total += tl.load(
                partial + split * split_stride + at + level * BR, mask=mask_n[:, None], other=0.0
            )
        z = z + (total,)
    a = walk_levels(
        z,
        mixing + index * (L * (L - 1) // 2 * BR * BR),
        pick(down_bias, tower),
        pick(saved, tower),
        offs_n,
        mask_n,
        exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND),
        L,
        R,
        BR,
        GELU,
        PRECISION,
    )
    for level in tl.static_range(L):
        tl.store(activations + at + level * BR, a[level], mask=mask_n[:, None])


@triton.jit
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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """*up* alone: out = u_L (already there) + Σ_l κ_{L,l} W_up,l a_l, by Horner's rule over the levels."""
    tower = tl.program_id(0)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    offs_d = tl.program_id(2) * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_n = offs_n < N
    mask_d = offs_d < D
    carry += pick_constant(TOWERS, tower) * L
    weight = pick(up_weight, tower) + offs_d[None, :] * R + offs_r[:, None]
    mask_w = mask_d[None, :] & (offs_r < R)[:, None]
    rows = activations + ((tower.to(tl.int64) * N + offs_n) * L * BR)[:, None] + offs_r[None, :]
    acc = tl.zeros((BN, BD), tl.float32)
    for level in range(L):
        a = tl.load(rows + level * BR, mask=mask_n[:, None], other=0)
        w = tl.load(weight + level * D * R, mask=mask_w, other=0)
        acc = dot(a, w, acc * tl.load(carry + level), PRECISION)
    exists = exists_mask(present, present_stride, tower, offs_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    at = pick(out, tower) + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    acc += tl.load(at, mask=mask, other=0).to(tl.float32)
    tl.store(at, narrow(tl.where(exists[:, None], acc, 0.0), at.dtype.element_ty), mask=mask)


@triton.jit
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
    a = walk_levels(
        z,
        mixing + index.to(tl.int64) * (L * (L - 1) // 2 * BR * BR),
        pick(down_bias, tower),
        pick(saved, tower),
        offs_n,
        mask_n,
        exists,
        L,
        R,
        BR,
        GELU,
        PRECISION,
    )
    tl.debug_barrier()  # u_L was written by other threads of this program
    offs_r = tl.arange(0, BR)
    mask_r = offs_r < R
    weight = pick(up_weight, tower)
    for d in range(0, D, BU):
        offs_d = d + tl.arange(0, BU)
        mask_d = offs_d < D
        at = here + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = mask_n[:, None] & mask_d[None, :]
        u = tl.load(at, mask=mask, other=0).to(tl.float32)
        acc = tl.zeros((BN, BU), tl.float32)
        for level in tl.static_range(L):
            w = tl.load(  # [BR, BU]
                weight + level * D * R + offs_d[None, :] * R + offs_r[:, None],
                mask=mask_d[None, :] & mask_r[:, None],
                other=0,
            )
            acc = dot(a[level], w, acc * tl.load(carry + index * L + level), PRECISION)
        tl.store(at, narrow(tl.where(exists[:, None], u + acc, 0.0), at.dtype.element_ty), mask=mask)
