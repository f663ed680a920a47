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
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    index_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    index_r = tl.arange(0, BLOCK_R)
    mask_d = index_d < D
    mask_r = index_r < R
    mask_w = mask_r[:, None] & mask_d[None, :]
    mask_t = mask_d[:, None] & mask_r[None, :]
    carry += pick_constant(TOWERS, tower) * L
    index_p = tl.arange(0, DEPTH)
    down = pick(down_weight, tower) + index_d[:, None] + index_p[None, :] * D  # [BD, DEPTH]
    up = pick(up_weight, tower)
    products += tower.to(tl.int64) * ((D + L * BLOCK_R) * (L * BLOCK_R))
    small = products + D * (L * BLOCK_R)  # S[0, 0], [r of dz, r of a]

    h_pointer = products + index_d[:, None] * (L * BLOCK_R) + (level * BLOCK_R + index_r)[None, :]
    h = tl.load(h_pointer, mask=mask_d[:, None], other=0.0)  # [BD, BR]
    own = tl.load(  # [BD, BR]
        up + level * D * R + index_d[:, None] * R + index_r[None, :], mask=mask_t, other=0
    )
    gate_products += ((level * tl.num_programs(2) + chunk) * towers + tower) * L
    for i in range(L):
        q = L - 1 - i
        gate = tl.zeros((), tl.float32)
        if q > level:
            for r in range(0, BLOCK_R, DEPTH):
                mask_p = mask_d[:, None] & (r + index_p < R)[None, :]
                w = tl.load(down + (q * R + r) * D, mask=mask_p, other=0).to(tl.float32)  # [BD, DEPTH]
                offset_s = (q * BLOCK_R + r + index_p)[:, None] * (L * BLOCK_R) + (level * BLOCK_R + index_r)[
                    None, :
                ]
                h = dot(w, tl.load(small + offset_s), h, PRECISION)
            gate = tl.sum(tl.sum(own.to(tl.float32) * h, 1), 0)
            for j in range(level + 1, q):
                gate *= tl.load(carry + j)
            h *= tl.load(carry + q)
        tl.store(gate_products + q, gate)
    up_base = pick(up_grad, tower)
    up_pointer = up_base + level * D * R + index_d[:, None] * R + index_r[None, :]
    tl.store(up_pointer, narrow(h, up_base.dtype.element_ty), mask=mask_t)

    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)  # [BR, BD]
    share = partial + (tower * L + level).to(tl.int64) * (R * D) + index_r[:, None] * D + index_d[None, :]
    for split in range(splits):
        total += tl.load(share + tl.cast(split, tl.int64) * towers * (L * R * D), mask=mask_w, other=0.0)
    kappa = tl.full((), 1.0, tl.float32)
    for i in range(level):
        p = level - 1 - i
        kappa *= tl.load(carry + p + 1)
        for r in range(0, BLOCK_R, DEPTH):
            mask_p = (r + index_p < R)[:, None] & mask_d[None, :]
            w_pointer = up + p * D * R + index_d[None, :] * R + (r + index_p)[:, None]
            w = tl.load(w_pointer, mask=mask_p, other=0).to(tl.float32)  # [DEPTH, BD]
            offset_s = (level * BLOCK_R + index_r)[:, None] * (L * BLOCK_R) + (p * BLOCK_R + r + index_p)[
                None, :
            ]
            total = dot(tl.load(small + offset_s) * kappa, w, total, PRECISION)
    down_base = pick(down_grad, tower)
    down_pointer = down_base + level * R * D + index_r[:, None] * D + index_d[None, :]
    tl.store(down_pointer, narrow(total, down_base.dtype.element_ty), mask=mask_w)


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
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Bias gradients from Σ g and Σ dz (their recursion is linear), and the gates' sums [T, L, K + 1]."""
    tower = tl.program_id(0)
    chunk = tl.program_id(1)
    towers = tl.num_programs(0)
    index = pick_constant(TOWERS, tower)
    index_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    index_r = tl.arange(0, BLOCK_R)
    mask_d = index_d < D
    mask_r = index_r < R
    sums += tower * (D + L * BLOCK_R)
    ds = tl.load(sums + index_d, mask=mask_d, other=0.0)  # [BD]
    down = pick(down_weight, tower)
    up_base = pick(up_bias_grad, tower)
    down_base = pick(down_bias_grad, tower)
    for i in range(L):
        level = L - 1 - i
        tl.store(up_base + level * D + index_d, narrow(ds, up_base.dtype.element_ty), mask=mask_d)
        dz = tl.load(sums + D + level * BLOCK_R + index_r)  # [BR]
        w = tl.load(
            down + level * R * D + index_r[:, None] * D + index_d[None, :],
            mask=mask_r[:, None] & mask_d[None, :],
            other=0,
        )
        ds = (ds + tl.sum(w.to(tl.float32) * dz[:, None], 0)) * tl.load(carry + index * L + level)
        if chunk == 0:
            tl.store(down_base + level * R + index_r, narrow(dz, down_base.dtype.element_ty), mask=mask_r)
    if chunk == 0:
        index_g = tl.arange(0, BLOCK_G)
        mask_g = index_g < L * (K + 1)
        total = sum_parts(gate_partial, parts, towers, tower, index_g, mask_g, L * (K + 1), BLOCK_P, BLOCK_G)
        of_carry = mask_g & (index_g % (K + 1) == K)
        total += sum_parts(
            gate_products, product_parts, towers, tower, index_g // (K + 1), of_carry, L, BLOCK_P, BLOCK_G
        )
        tl.store(gate_sum + index * (L * (K + 1)) + index_g, total, mask=mask_g)


@triton.jit
def sum_parts(
    values,
    parts,
    towers,
    tower,
    index_g,
    mask,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Σ over parts, in order, of values [parts, T, WIDTH] at this tower's columns, [BG]."""
    total = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)  # [BP, BG]
    for first in range(0, parts, BLOCK_P):
        index_p = first + tl.arange(0, BLOCK_P)
        pointer = values + ((index_p * towers + tower) * WIDTH)[:, None] + index_g[None, :]
        total += tl.load(pointer, mask=(index_p < parts)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)
