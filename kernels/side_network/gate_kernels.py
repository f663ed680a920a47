# mypy: disable-error-code="assignment"
"""What a side network call forms once from weights and gates alone: coefficients, G, gate gradients."""

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
    down_weight,
    up_weight,
    carry,
    mixing,
    WIDTHS: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    index_i = (tile // (BLOCK_R // BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    index_j = (tile % (BLOCK_R // BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_i = index_i < R
    mask_j = index_j < R
    down = pick(down_weight, tower) + later.to(tl.int64) * R * width
    up = pick(up_weight, tower) + earlier.to(tl.int64) * R * width
    acc = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)  # [BT, BT]
    for d in range(0, width, BLOCK_D):
        index_d = d + tl.arange(0, BLOCK_D)
        mask_d = index_d < width
        a = tl.load(  # [BT, BD]
            down + index_i[:, None] * width + index_d[None, :],
            mask=mask_i[:, None] & mask_d[None, :],
            other=0,
        )
        b = tl.load(  # [BD, BT]
            up + index_d[:, None] * R + index_j[None, :], mask=mask_d[:, None] & mask_j[None, :], other=0
        )
        acc = dot(a, b, acc, PRECISION)
    kappa = tl.full((), 1.0, tl.float32)
    for j in range(earlier + 1, later + 1):
        kappa *= tl.load(carry + tower * L + j)
    offset = (tower.to(tl.int64) * (L * (L - 1) // 2) + pair) * BLOCK_R * BLOCK_R
    tl.store(
        mixing + offset + index_i[:, None] * BLOCK_R + index_j[None, :],
        narrow(acc * kappa, mixing.dtype.element_ty),
    )


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
