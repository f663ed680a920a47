# mypy: disable-error-code="assignment"
"""The side network's walk backwards (kernels/README.md has the algebra and the tiling).

In the notation of forward_kernels.py, with ge the gradient of e:

    da_p = Σ_{L>l>p} G[l, p]ᵀ dz_l + G[L, p]ᵀ ge,    dz_p = da_p · act'(z_p)            (*grad_walk*)
    dx_L = W_headᵀ ge,   dx_l = carry_{l+1}·dx_{l+1} + W_down,lᵀ dz_l
    dcoef_{l,k} = Σ ⟨dx_l, source_k⟩,   dcarry_l = Σ ⟨dx_l, h_{l−1}⟩

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
    pick_constant,
    product_depth,
)
from crossan_fast.kernels.side_network.tiles import exists_mask


@triton.jit
def add_gradients(
    da,
    rows,
    matrix,
    mask_n,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da [BN, BR] + x G with x [BN, BX] at `rows` (pointers [BN, 1]) and G [BX, BR] at `matrix`."""
    DEPTH: tl.constexpr = product_depth(BLOCK_X)
    index_x = tl.arange(0, DEPTH)
    tile = matrix + index_x[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]  # [DEPTH, BR]
    for x in range(0, BLOCK_X, DEPTH):
        dz = tl.load(rows + x + index_x[None, :], mask=mask_n[:, None], other=0)  # [BN, DEPTH]
        da = dot(dz, tl.load(tile + x * BLOCK_R), da, PRECISION)
    return da


@triton.jit(do_not_specialize=["N", "saved_items"])
def grad_walk_kernel(
    grad_out,
    presence,
    mixing,
    saved,
    grad_z,
    activations,
    N,
    saved_items,
    GROUP: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of an item dz of all levels, then ge (zero where the tower has no source), and a: all that sums need.

    grad_z [T, N, ROW] and activations [T, N, L, BR], in the compute dtype. Levels go through memory, as in
    *walk*.
    """
    L: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[2]
    E: tl.constexpr = SIZES[3]
    ALL: tl.constexpr = SIZES[5]
    ROW: tl.constexpr = L * BLOCK_R + BLOCK_E
    PAIRS: tl.constexpr = L * (L - 1) // 2
    TOWERS: tl.constexpr = GROUP[0]
    tower = tl.program_id(0)
    index_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < N
    index_r = tl.arange(0, BLOCK_R)
    index_e = tl.arange(0, BLOCK_E)
    index = pick_constant(TOWERS, tower).to(tl.int64)
    mixing += index * (PAIRS * BLOCK_R * BLOCK_R + L * BLOCK_E * BLOCK_R)
    exists = exists_mask(presence, tower, index_n, mask_n, GROUP)
    row = tower.to(tl.int64) * N + index_n
    dz_rows = grad_z + (row * ROW)[:, None]
    a_rows = activations + (row * (L * BLOCK_R))[:, None]
    z_rows = saved + ((index * saved_items + index_n) * (L * R))[:, None]
    ge = tl.load(  # [BN, BE]
        grad_out + ((index_n.to(tl.int64) * ALL + index) * E)[:, None] + index_e[None, :],
        mask=exists[:, None] & (index_e < E)[None, :],
        other=0,
    )
    tl.store(dz_rows + L * BLOCK_R + index_e[None, :], ge, mask=mask_n[:, None])
    for i in range(L):
        level = L - 1 - i
        tl.debug_barrier()  # what other threads of this program wrote is read below
        da = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)  # [BN, BR]
        head = mixing + (PAIRS * BLOCK_R * BLOCK_R) + level * (BLOCK_E * BLOCK_R)
        da = add_gradients(da, dz_rows + L * BLOCK_R, head, mask_n, BLOCK_E, BLOCK_R, PRECISION)
        for q in tl.range(level + 1, L, num_stages=3):
            matrix = mixing + (q * (q - 1) // 2 + level) * (BLOCK_R * BLOCK_R)
            da = add_gradients(da, dz_rows + q * BLOCK_R, matrix, mask_n, BLOCK_R, BLOCK_R, PRECISION)
        z = tl.load(  # [BN, BR]
            z_rows + level * R + index_r[None, :], mask=exists[:, None] & (index_r < R)[None, :], other=0
        ).to(tl.float32)
        dz = narrow(da * activate_grad(z, GELU), grad_z.dtype.element_ty)  # [BN, BR]
        tl.store(dz_rows + level * BLOCK_R + index_r[None, :], dz, mask=mask_n[:, None])
        a = narrow(activate(z, GELU), activations.dtype.element_ty)
        tl.store(a_rows + level * BLOCK_R + index_r[None, :], a, mask=mask_n[:, None])
