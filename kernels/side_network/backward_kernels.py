# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Backward kernels of the side network (kernels/README.md has the algebra and the tiling).

In the notation of forward_kernels.py, with g the gradient of h_L and u_l the sum without its
up-projections:

    da_l = κ_{L,l} W_up,lᵀ g + Σ_{q>l} G[q, l]ᵀ dz_q,    dz_l = da_l · act'(z_l)            (*grad_walk*)
    dx_l = dh_l + W_down,lᵀ dz_l,    dh_{l−1} = carry_l·dx_l,    dh_{L−1} = g
    dW_down,l = Σ dz_l x_lᵀ,  dW_up,l = Σ dh_l a_lᵀ,  dcoef_{l,k} = Σ ⟨dx_l, source_k⟩
    dcarry_l = Σ ⟨dx_l, h_{l−1}⟩

The walk is here; the sums over items are in weight_gradient_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import (
    activate,
    activate_grad,
    dot,
    narrow,
    pick,
    pick_constant,
    product_depth,
)
from crossan_fast.kernels.side_network.tiles import (
    exists_mask,
    sum_splits,
)


@triton.jit
def grad_down_levels(
    grad_out,
    up_weight,
    index_n,
    exists,
    begin,
    end,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_up,lᵀ g of levels FIRST … over columns [begin, end): a tuple of [BN, BR] in fp32."""
    index_r = tl.arange(0, BLOCK_R)
    mask_r = index_r < R
    e = ()
    for _ in tl.static_range(COUNT):
        e = e + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
    row_pointer = grad_out + index_n.to(tl.int64) * D
    for d in range(begin, end, BLOCK_D):
        index_d = d + tl.arange(0, BLOCK_D)
        mask_d = index_d < D
        g = tl.load(  # [BN, BD]
            row_pointer[:, None] + index_d[None, :], mask=exists[:, None] & mask_d[None, :], other=0
        )
        e_next = ()
        for i in tl.static_range(COUNT):
            weight = tl.load(  # [BD, BR]
                up_weight + (FIRST + i) * D * R + index_d[:, None] * R + index_r[None, :],
                mask=mask_d[:, None] & mask_r[None, :],
                other=0,
            )
            e_next = e_next + (dot(g, weight, e[i], PRECISION),)
        e = e_next
    return e


@triton.jit(do_not_specialize=["N"])
def grad_down_kernel(
    grad_out,
    up_weight,
    present,
    present_stride,
    partial,
    N,
    span,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products with g alone, for `span` columns a program: partial [splits, T, N, L, BR]."""
    tower = tl.program_id(0)
    split = tl.program_id(2)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    begin = split * span
    e = grad_down_levels(
        pick(grad_out, tower),
        pick(up_weight, tower),
        index_n,
        exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND),
        begin,
        tl.minimum(begin + span, D),
        FIRST,
        COUNT,
        D,
        R,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        PRECISION,
    )
    row = (split * tl.num_programs(0) + tower).to(tl.int64) * N + index_n
    pointer = partial + (row * L * BLOCK_R)[:, None] + tl.arange(0, BLOCK_R)[None, :]
    for i in tl.static_range(COUNT):
        tl.store(pointer + (FIRST + i) * BLOCK_R, e[i], mask=mask_n[:, None])


@triton.jit
def grad_walk_level(
    da,
    level,
    mixing,
    saved,
    grad_z,
    activations,
    mask_n,
    exists,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Finish da of a level from κ·W_upᵀ g [BN, BR], write its dz and a; pointers [BN, 1] are to level 0."""
    index_r = tl.arange(0, BLOCK_R)
    DEPTH: tl.constexpr = product_depth(BLOCK_R)
    index_p = tl.arange(0, DEPTH)
    tile = mixing + index_p[:, None] * BLOCK_R + index_r[None, :]  # [r of z, r of a]
    for q in tl.range(level + 1, L, num_stages=3):
        pair = q * (q - 1) // 2 + level
        for r in range(0, BLOCK_R, DEPTH):
            dz = tl.load(  # [BN, DEPTH]
                grad_z + (q * BLOCK_R + r) + index_p[None, :], mask=mask_n[:, None], other=0
            )
            da = dot(dz, tl.load(tile + pair * (BLOCK_R * BLOCK_R) + r * BLOCK_R), da, PRECISION)
    saved += index_r[None, :]
    grad_z += index_r[None, :]
    activations += index_r[None, :]
    z = tl.load(  # [BN, BR]
        saved + level * R, mask=exists[:, None] & (index_r < R)[None, :], other=0
    ).to(tl.float32)
    dz = narrow(da * activate_grad(z, GELU), grad_z.dtype.element_ty)  # [BN, BR]
    tl.store(grad_z + level * BLOCK_R, dz, mask=mask_n[:, None])
    a = narrow(activate(z, GELU), activations.dtype.element_ty)
    tl.store(activations + level * BLOCK_R, a, mask=mask_n[:, None])
    tl.debug_barrier()  # other threads of this program read dz for the levels before


@triton.jit(do_not_specialize=["N", "splits"])
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
    splits,
    TOWERS: tl.constexpr,
    EXISTS_FIRST: tl.constexpr,
    EXISTS_SECOND: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz and a, [T, N, L, BR] in the compute dtype; without `partial`, products with g are formed here."""
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index_r = tl.arange(0, BLOCK_R)
    index = pick_constant(TOWERS, tower).to(tl.int64)
    carry += index * L
    mixing += index * (L * (L - 1) // 2 * BLOCK_R * BLOCK_R)
    exists = exists_mask(present, present_stride, tower, index_n, mask_n, EXISTS_FIRST, EXISTS_SECOND)
    offset = ((tower.to(tl.int64) * N + index_n) * L * BLOCK_R)[:, None]
    z_pointer = pick(saved, tower) + (index_n.to(tl.int64) * L * R)[:, None]
    tail = tl.full((), 1.0, tl.float32)  # κ_{L,l}
    if partial is None:
        e = grad_down_levels(
            pick(grad_out, tower),
            pick(up_weight, tower),
            index_n,
            exists,
            0,
            D,
            0,
            L,
            D,
            R,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
            PRECISION,
        )
        for i in tl.static_range(L):
            grad_walk_level(
                e[L - 1 - i] * tail,
                L - 1 - i,
                mixing,
                z_pointer,
                grad_z + offset,
                activations + offset,
                mask_n,
                exists,
                L,
                R,
                BLOCK_R,
                GELU,
                PRECISION,
            )
            tail *= tl.load(carry + L - 1 - i)
    else:
        split_stride = tl.num_programs(0).to(tl.int64) * N * L * BLOCK_R
        for i in range(L):
            level = L - 1 - i
            grad_walk_level(
                sum_splits(
                    partial + offset + index_r[None, :] + level * BLOCK_R,
                    mask_n,
                    splits,
                    split_stride,
                    BLOCK_N,
                    BLOCK_R,
                )
                * tail,
                level,
                mixing,
                z_pointer,
                grad_z + offset,
                activations + offset,
                mask_n,
                exists,
                L,
                R,
                BLOCK_R,
                GELU,
                PRECISION,
            )
            tail *= tl.load(carry + level)
