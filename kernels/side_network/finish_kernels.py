# mypy: disable-error-code="assignment"
"""The side network's gradients once the sums over items are there: weights, biases, gates' sums.

With C_p = Σ g a_pᵀ, S[q, p] = Σ dz_q a_pᵀ and P_l = Σ dz_l u_lᵀ (backward_kernels.py):

    H_{L−1} = C_p,  X_q = H_q + W_down,qᵀ S[q, p],  H_{q−1} = carry_q·X_q,  dW_up,p = H_p
    dW_down,l = P_l + Σ_{p<l} κ_{l,p} S[l, p] W_up,pᵀ
    dcarry_q = Σ ⟨dx_q, u_{q−1}⟩ + Σ_{p<q} κ_{q−1,p} ⟨W_up,p, X_q⟩
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import dot, narrow, pick, pick_constant


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    products,
    partial,
    carry,
    down_weight,
    up_weight,
    down_grad,
    up_grad,
    gate_products,
    splits,
    TOWERS: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_up and dW_down of a level for BD columns; gate_products [L, chunks, T, L]: what p adds to dcarry_q.

    The small products take fp32 operands: rounding S to the weights' type would round every item's
    contribution the same way, where rounding item by item averages out.
    """
    tower = tl.program_id(0)
    level = tl.program_id(1)
    chunk = tl.program_id(2)
    towers = tl.num_programs(0)
    offs_d = chunk * BD + tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    mask_d = offs_d < D
    mask_r = offs_r < R
    mask_w = mask_r[:, None] & mask_d[None, :]
    mask_t = mask_d[:, None] & mask_r[None, :]
    carry += pick_constant(TOWERS, tower) * L
    offs_p = tl.arange(0, DEPTH)
    down = pick(down_weight, tower) + offs_d[:, None] + offs_p[None, :] * D  # [BD, DEPTH]
    up = pick(up_weight, tower)
    products += tower.to(tl.int64) * ((D + L * BR) * (L * BR))
    small = products + D * (L * BR)  # S[0, 0], [r of dz, r of a]

    at_h = products + offs_d[:, None] * (L * BR) + (level * BR + offs_r)[None, :]
    h = tl.load(at_h, mask=mask_d[:, None], other=0.0)
    own = tl.load(up + level * D * R + offs_d[:, None] * R + offs_r[None, :], mask=mask_t, other=0)
    gate_products += ((level * tl.num_programs(2) + chunk) * towers + tower) * L
    for i in range(L):
        q = L - 1 - i
        gate = tl.zeros((), tl.float32)
        if q > level:
            for r in range(0, BR, DEPTH):
                mask_p = mask_d[:, None] & (r + offs_p < R)[None, :]
                w = tl.load(down + (q * R + r) * D, mask=mask_p, other=0).to(tl.float32)
                at_s = (q * BR + r + offs_p)[:, None] * (L * BR) + (level * BR + offs_r)[None, :]
                h = dot(w, tl.load(small + at_s), h, PRECISION)
            gate = tl.sum(tl.sum(own.to(tl.float32) * h, 1), 0)
            for j in range(level + 1, q):
                gate *= tl.load(carry + j)
            h *= tl.load(carry + q)
        tl.store(gate_products + q, gate)
    to = pick(up_grad, tower)
    at = to + level * D * R + offs_d[:, None] * R + offs_r[None, :]
    tl.store(at, narrow(h, to.dtype.element_ty), mask=mask_t)

    total = tl.zeros((BR, BD), tl.float32)
    share = partial + (tower * L + level).to(tl.int64) * (R * D) + offs_r[:, None] * D + offs_d[None, :]
    for split in range(splits):
        total += tl.load(share + tl.cast(split, tl.int64) * towers * (L * R * D), mask=mask_w, other=0.0)
    kappa = tl.full((), 1.0, tl.float32)
    for i in range(level):
        p = level - 1 - i
        kappa *= tl.load(carry + p + 1)
        for r in range(0, BR, DEPTH):
            mask_p = (r + offs_p < R)[:, None] & mask_d[None, :]
            at_w = up + p * D * R + offs_d[None, :] * R + (r + offs_p)[:, None]
            w = tl.load(at_w, mask=mask_p, other=0).to(tl.float32)
            at_s = (level * BR + offs_r)[:, None] * (L * BR) + (p * BR + r + offs_p)[None, :]
            total = dot(tl.load(small + at_s) * kappa, w, total, PRECISION)
    to_down = pick(down_grad, tower)
    at_down = to_down + level * R * D + offs_r[:, None] * D + offs_d[None, :]
    tl.store(at_down, narrow(total, to_down.dtype.element_ty), mask=mask_w)


@triton.jit(do_not_specialize=["parts", "product_parts"])
def finish_kernel(
    sums,
    gate_partial,
    gate_products,
    carry,
    down_weight,
    down_bias_grad,
    up_bias_grad,
    gate_sum,
    parts,
    product_parts,
    TOWERS: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
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
    sums += tower * (D + L * BR)
    ds = tl.load(sums + offs_d, mask=mask_d, other=0.0)
    down = pick(down_weight, tower)
    up_at = pick(up_bias_grad, tower)
    down_at = pick(down_bias_grad, tower)
    for i in range(L):
        level = L - 1 - i
        tl.store(up_at + level * D + offs_d, narrow(ds, up_at.dtype.element_ty), mask=mask_d)
        dz = tl.load(sums + D + level * BR + offs_r)
        w = tl.load(
            down + level * R * D + offs_r[:, None] * D + offs_d[None, :],
            mask=mask_r[:, None] & mask_d[None, :],
            other=0,
        )
        ds = (ds + tl.sum(w.to(tl.float32) * dz[:, None], 0)) * tl.load(carry + index * L + level)
        if chunk == 0:
            tl.store(down_at + level * R + offs_r, narrow(dz, down_at.dtype.element_ty), mask=mask_r)
    if chunk == 0:
        gate = tl.arange(0, BG)
        mask_gate = gate < L * (K + 1)
        total = sum_parts(gate_partial, parts, towers, tower, gate, mask_gate, L * (K + 1), BP, BG)
        of_carry = mask_gate & (gate % (K + 1) == K)
        total += sum_parts(gate_products, product_parts, towers, tower, gate // (K + 1), of_carry, L, BP, BG)
        tl.store(gate_sum + index * (L * (K + 1)) + gate, total, mask=mask_gate)


@triton.jit
def sum_parts(
    values, parts, towers, tower, column, mask, WIDTH: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr
):
    """Σ over parts, in order, of values [parts, T, WIDTH] at this tower's columns, [BG]."""
    total = tl.zeros((BP, BG), tl.float32)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        at = values + ((part * towers + tower) * WIDTH)[:, None] + column[None, :]
        total += tl.load(at, mask=(part < parts)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)
