# mypy: disable-error-code="assignment"
"""The side network's gradients once the sums over items are there: weights, biases, gates' sums.

In the notation of weight_gradient_kernels.py, with S[l, p] = Σ dz_l a_pᵀ, P_l = Σ dz_l u_lᵀ and s_l = Σ dz_l:

    X_L = W_headᵀ S[L, p],   X_l = carry_{l+1}·X_{l+1} + W_down,lᵀ S[l, p],   dW_up,p = carry_{p+1}·X_{p+1}
    dW_l = P_l + Σ_{p<l} κ_{l,p} (S[l, p] W_up,pᵀ + s_l b_up,pᵀ)
    dcarry_l = Σ ⟨dx_l, u_{l−1}⟩ + Σ_{p<l} κ_{l−1,p} (⟨W_up,p, X_l⟩ + …)

and b_up,p is one more column of W_up,p, whose activation is 1 and whose S[l, p] is s_l. carry_L is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import dot, narrow, pick, pick_constant


@triton.jit
def add_reader(
    x,
    x_bias,
    weight,
    products,
    sums,
    mask_d,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(x [BD, BR] + Wᵀ S, x_bias [BD] + Wᵀ s) of one reader's W [ROWS, D]; `weight` is at row 0, [BD, 1]."""
    index_p = tl.arange(0, DEPTH)
    index_r = tl.arange(0, BLOCK_R)
    for r in range(0, BLOCK_X, DEPTH):
        row = r + index_p
        mask_w = mask_d[:, None] & (row < ROWS)[None, :]
        w = tl.load(weight + row[None, :] * D, mask=mask_w, other=0).to(tl.float32)  # [BD, DEPTH]
        x = dot(w, tl.load(products + row[:, None] * WIDTH + index_r[None, :]), x, PRECISION)
        x_bias += tl.sum(w * tl.load(sums + row)[None, :], 1)
    return x, x_bias


@triton.jit
def up_gradients(
    level,
    products,
    sums,
    carry,
    weights,
    up_bias,
    up_grad,
    up_bias_grad,
    gate_products,
    index_d,
    SIZES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPTH: tl.constexpr,
    DEPTH_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_up and db_up of `level` in columns index_d, and what they add to each level's dcarry."""
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    WIDTH: tl.constexpr = L * BLOCK_R
    down, up, head = weights
    index_r = tl.arange(0, BLOCK_R)
    mask_d = index_d < D
    mask_t = mask_d[:, None] & (index_r < R)[None, :]
    offset = level * D * R + index_d[:, None] * R + index_r[None, :]
    own_bias = tl.load(up_bias + level * D + index_d, mask=mask_d, other=0).to(tl.float32)  # [BD]
    products += level * BLOCK_R
    x, x_bias = add_reader(
        tl.zeros_like(offset).to(tl.float32),
        tl.zeros_like(own_bias),
        head + index_d[:, None],
        products + L * BLOCK_R * WIDTH,
        sums + L * BLOCK_R,
        mask_d,
        E,
        D,
        WIDTH,
        BLOCK_E,
        BLOCK_R,
        DEPTH_E,
        PRECISION,
    )
    for i in range(L):
        q = L - 1 - i
        gate = tl.zeros((), tl.float32)
        if q > level:
            x, x_bias = add_reader(
                x,
                x_bias,
                down + q * R * D + index_d[:, None],
                products + q * BLOCK_R * WIDTH,
                sums + q * BLOCK_R,
                mask_d,
                R,
                D,
                WIDTH,
                BLOCK_R,
                BLOCK_R,
                DEPTH,
                PRECISION,
            )
            own = tl.load(up + offset, mask=mask_t, other=0).to(tl.float32)  # [BD, BR]
            gate = tl.sum(tl.sum(own * x, 1) + own_bias * x_bias, 0)
            for j in range(level + 1, q):
                gate *= tl.load(carry + j)
            own_carry = tl.load(carry + q)
            x *= own_carry
            x_bias *= own_carry
        tl.store(gate_products + q, gate)
    tl.store(up_grad + offset, narrow(x, up_grad.dtype.element_ty), mask=mask_t)
    pointer = up_bias_grad + level * D + index_d
    tl.store(pointer, narrow(x_bias, up_bias_grad.dtype.element_ty), mask=mask_d)


@triton.jit
def reader_gradient(
    level,
    products,
    sums,
    partial,
    split_stride,
    splits,
    carry,
    up,
    up_bias,
    grad,
    bias_grad,
    index_d,
    ROWS: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_l and db_l of what reads h at `level`, ROWS rows, in columns index_d; pointers are at its row 0."""
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    WIDTH: tl.constexpr = L * BLOCK_R
    index_x = tl.arange(0, BLOCK_X)
    index_p = tl.arange(0, DEPTH)
    mask_d = index_d < D
    mask_w = (index_x < ROWS)[:, None] & mask_d[None, :]
    total = tl.zeros((BLOCK_X, index_d.shape[0]), tl.float32)  # [BX, BD]
    own = index_x[:, None] * D + index_d[None, :]
    for split in range(splits):
        total += tl.load(partial + own + tl.cast(split, tl.int64) * split_stride, mask=mask_w, other=0.0)
    products += index_x[:, None] * WIDTH
    h = tl.zeros_like(index_d).to(tl.float32)  # [BD], what biases alone make of h
    kappa = tl.full((), 1.0, tl.float32)
    for i in range(level):
        p = level - 1 - i
        kappa *= tl.load(carry + p + 1, mask=p + 1 < L, other=1.0)
        h += kappa * tl.load(up_bias + p * D + index_d, mask=mask_d, other=0).to(tl.float32)
        for r in range(0, BLOCK_R, DEPTH):
            row = r + index_p
            w = tl.load(  # [DEPTH, BD]
                up + p * D * R + index_d[None, :] * R + row[:, None],
                mask=(row < R)[:, None] & mask_d[None, :],
                other=0,
            ).to(tl.float32)
            s = tl.load(products + (p * BLOCK_R + row)[None, :]) * kappa
            total = dot(s, w, total, PRECISION)
    dz = tl.load(sums + index_x)  # [BX]
    total += dz[:, None] * h[None, :]
    tl.store(grad + own, narrow(total, grad.dtype.element_ty), mask=mask_w)
    if tl.program_id(2) == 0:
        tl.store(bias_grad + index_x, narrow(dz, bias_grad.dtype.element_ty), mask=index_x < ROWS)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    products,
    sums,
    partial,
    carry,
    weights,
    up_bias,
    weight_grads,
    bias_grads,
    gate_products,
    splits,
    TOWERS: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPTH: tl.constexpr,
    DEPTH_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights' and biases' gradients for BD columns: of a W_up, or of what reads h at a level, the head last.

    gate_products [L, chunks, T, L]: what the activations of level p add to dcarry_l. The small products take
    fp32 operands: rounding S to the weights' type would round every item's contribution the same way, where
    rounding item by item averages out.
    """
    L: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    ROW: tl.constexpr = L * BLOCK_R + BLOCK_E
    tower = tl.program_id(0)
    level = tl.program_id(1) % L
    towers = tl.num_programs(0)
    index_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    carry += pick_constant(TOWERS, tower) * L
    up = pick(weights[1], tower)
    biases = pick(up_bias, tower)
    products += tower.to(tl.int64) * (ROW * L * BLOCK_R)
    sums += tower * ROW
    partial += tower.to(tl.int64) * ((L * R + E) * D)
    split_stride = towers * ((L * R + E) * D)
    if tl.program_id(1) < L:
        up_gradients(
            level,
            products,
            sums,
            carry,
            (pick(weights[0], tower), up, pick(weights[2], tower)),
            biases,
            pick(weight_grads[1], tower),
            pick(bias_grads[1], tower),
            gate_products + ((level * tl.num_programs(2) + tl.program_id(2)) * towers + tower) * L,
            index_d,
            SIZES,
            BLOCK_R,
            BLOCK_E,
            DEPTH,
            DEPTH_E,
            PRECISION,
        )
    elif tl.program_id(1) < 2 * L:
        reader_gradient(
            level,
            products + level * (BLOCK_R * L * BLOCK_R),
            sums + level * BLOCK_R,
            partial + level * R * D,
            split_stride,
            splits,
            carry,
            up,
            biases,
            pick(weight_grads[0], tower) + level * R * D,
            pick(bias_grads[0], tower) + level * R,
            index_d,
            R,
            SIZES,
            BLOCK_R,
            BLOCK_R,
            DEPTH,
            PRECISION,
        )
    else:
        reader_gradient(
            L,
            products + L * BLOCK_R * (L * BLOCK_R),
            sums + L * BLOCK_R,
            partial + L * R * D,
            split_stride,
            splits,
            carry,
            up,
            biases,
            pick(weight_grads[2], tower),
            pick(bias_grads[2], tower),
            index_d,
            E,
            SIZES,
            BLOCK_E,
            BLOCK_R,
            DEPTH,
            PRECISION,
        )


@triton.jit(do_not_specialize=["parts", "product_parts"])
def gate_sums_kernel(
    gate_partial,
    gate_products,
    gate_sum,
    parts,
    product_parts,
    TOWERS: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gates' sums [T, L, K + 1] from every program's share."""
    tower = tl.program_id(0)
    towers = tl.num_programs(0)
    index_g = tl.arange(0, BLOCK_G)
    mask_g = index_g < L * (K + 1)
    total = sum_parts(gate_partial, parts, towers, tower, index_g, mask_g, L * (K + 1), BLOCK_P, BLOCK_G)
    of_carry = mask_g & (index_g % (K + 1) == K)
    total += sum_parts(
        gate_products, product_parts, towers, tower, index_g // (K + 1), of_carry, L, BLOCK_P, BLOCK_G
    )
    index = pick_constant(TOWERS, tower)
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
