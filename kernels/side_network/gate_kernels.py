# mypy: disable-error-code="assignment"
"""What a side network call forms once from weights and gates: coefficients, G, constants, gate gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import dot, narrow, pick, pick_constant


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
    BLOCK_L: tl.constexpr,
):
    """coef [T, L, K] and carry [T, L] (fp32) of all gates. One program: these are a few hundred numbers.

    KINDS[t·K + k]: −1 μ, −2 1 − μ, −3 no such source, n ≥ 0 tanh(cross_gates[n]). PAIRED[t]: carry 1.
    """
    index_l = tl.arange(0, BLOCK_L)
    mask_l = index_l < L
    for t in tl.static_range(len(gates)):
        theta = tl.load(gates[t] + index_l, mask=mask_l, other=0.0).to(tl.float32)
        mu = tl.sigmoid(theta * inverse_temperature)
        tl.store(carry + t * L + index_l, 1.0 if PAIRED[t] else 1.0 - mu, mask=mask_l)
        for k in tl.static_range(K):
            if KINDS[t * K + k] == -1:
                value = mu
            elif KINDS[t * K + k] == -2:
                value = 1.0 - mu
            elif KINDS[t * K + k] == -3:
                value = tl.zeros_like(mu)
            else:
                value = tanh(tl.load(cross_gates[KINDS[t * K + k]] + index_l, mask=mask_l, other=0.0))
            tl.store(coef + (t * L + index_l) * K + k, value, mask=mask_l)


@triton.jit
def tanh(x):
    """fp32 tanh; near 0, where gates start, by its series, which keeps what 2·sigmoid − 1 loses."""
    x = x.to(tl.float32)
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(s < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def mixing_kernel(
    weights,
    biases,
    carry,
    mixing,
    constants,
    WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G and constants of forward_kernels.py, zero beyond R and E; a program: a BI × BJ tile of G, or BI of
    the constants.

    mixing: per tower pair (l, p) at l(l−1)/2 + p, [BR, BR], the head's last, [BE, BR]. constants: [T, ROW].
    ALIGNED: every width is a multiple of 16, so that rows can be read 16 bytes at a time.
    """
    L: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    down_weight, up_weight, head_weight = weights
    down_bias, up_bias, head_bias = biases
    number = tl.program_id(0)
    tower = tl.program_id(1)
    tile = tl.program_id(2)
    width = pick_constant(WIDTHS, tower)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    PAIRS: tl.constexpr = L * (L + 1) // 2
    index_i = (tile // (BLOCK_R // BLOCK_J)) * BLOCK_I + tl.arange(0, BLOCK_I)
    later = number - PAIRS
    if number < PAIRS:
        later = tl.full((), 1, tl.int32)
        while later * (later + 1) // 2 <= number:
            later += 1
    rows = tl.where(later == L, E, R)
    block = tl.where(later == L, BLOCK_E, BLOCK_R)
    mask_i = index_i < rows
    reader = pick(down_weight, tower) + later.to(tl.int64) * R * width
    bias = pick(down_bias, tower) + later * R
    if later == L:
        reader = pick(head_weight, tower)
        bias = pick(head_bias, tower)
    carry += tower * L
    reader += index_i.to(tl.int64)[:, None] * width  # [BI, 1]
    if number < PAIRS:
        earlier = number - later * (later - 1) // 2
        index_j = (tile % (BLOCK_R // BLOCK_J)) * BLOCK_J + tl.arange(0, BLOCK_J)
        mask_j = index_j < R
        up = pick(up_weight, tower) + earlier.to(tl.int64) * R * width
        acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)  # [BI, BJ]
        for d in range(0, width, BLOCK_D):
            index_d = d + tl.arange(0, BLOCK_D)
            mask_d = index_d < width
            a = tl.load(reader + index_d[None, :], mask=mask_i[:, None] & mask_d[None, :], other=0)
            b = tl.load(  # [BD, BJ]
                up + index_d[:, None] * R + index_j[None, :], mask=mask_d[:, None] & mask_j[None, :], other=0
            )
            acc = dot(a, b, acc, PRECISION)
        kappa = tl.full((), 1.0, tl.float32)
        for j in range(earlier + 1, tl.minimum(later + 1, L)):
            kappa *= tl.load(carry + j)
        base = (number - earlier) * (BLOCK_R * BLOCK_R) + earlier * (block * BLOCK_R)
        base += tower.to(tl.int64) * (L * (L - 1) // 2 * BLOCK_R * BLOCK_R + L * BLOCK_E * BLOCK_R)
        tl.store(
            mixing + base + index_i[:, None] * BLOCK_R + index_j[None, :],
            narrow(acc * kappa, mixing.dtype.element_ty),
            mask=(index_i < block)[:, None],
        )
    elif tile % (BLOCK_R // BLOCK_J) == 0:
        own_carry = tl.load(carry + later, mask=later < L, other=1.0)
        up = pick(up_bias, tower)
        total = tl.load(bias + index_i, mask=mask_i, other=0).to(tl.float32)
        for d in range(0, width, BLOCK_D):
            index_d = d + tl.arange(0, BLOCK_D)
            mask_d = index_d < width
            h = tl.zeros((BLOCK_D,), tl.float32)  # what biases alone make of h, level by level
            for p in range(0, later):
                h *= tl.load(carry + p)
                h += tl.load(up + p * width + index_d, mask=mask_d, other=0).to(tl.float32)
            a = tl.load(reader + index_d[None, :], mask=mask_i[:, None] & mask_d[None, :], other=0)
            total += tl.sum(a.to(tl.float32) * (h * own_carry)[None, :], 1)
        place = tower * (L * BLOCK_R + BLOCK_E) + later * BLOCK_R + index_i
        tl.store(constants + place, total, mask=index_i < block)


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
    BLOCK_L: tl.constexpr,
):
    """Through sigmoid and tanh: what `coefficients_kernel` computed, backwards. One program."""
    index_l = tl.arange(0, BLOCK_L)
    mask_l = index_l < L
    for t in tl.static_range(len(gates)):
        sums = gate_sum + (t * L + index_l) * (K + 1)
        dmu = tl.zeros((BLOCK_L,), tl.float32)
        if not PAIRED[t]:
            dmu -= tl.load(sums + K, mask=mask_l, other=0.0)
        for k in tl.static_range(K):
            grad = tl.load(sums + k, mask=mask_l, other=0.0)
            if KINDS[t * K + k] == -1:
                dmu += grad
            elif KINDS[t * K + k] == -2:
                dmu -= grad
            elif KINDS[t * K + k] >= 0:
                value = tanh(tl.load(cross_gates[KINDS[t * K + k]] + index_l, mask=mask_l, other=0.0))
                base = cross_gate_grads[KINDS[t * K + k]]
                tl.store(
                    base + index_l, narrow(grad * (1.0 - value * value), base.dtype.element_ty), mask=mask_l
                )
        theta = tl.load(gates[t] + index_l, mask=mask_l, other=0.0).to(tl.float32)
        mu = tl.sigmoid(theta * inverse_temperature)
        dtheta = dmu * mu * (1.0 - mu) * inverse_temperature
        tl.store(gate_grads[t] + index_l, narrow(dtheta, gate_grads[t].dtype.element_ty), mask=mask_l)
