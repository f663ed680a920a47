# mypy: disable-error-code="assignment"
"""The sequence encoder's weight gradients: matrices as products over all places, then every sum of parts.

A weight's gradient is leftᵀ right of two matrices of `flow` (backward_kernels.py). A program owns a tile of
one over a part of the places; `partial` is `[parts, SIZE]`, a part holds all matrices in weights' order.
Parts, and sequences' shares of the vectors, are summed in their order: no atomics, bits repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import dot, narrow, pick, pick_constant
from crossan_fast.kernels.sequence_encoder.tiles import matrix_at


@triton.jit(do_not_specialize=["rows", "part_length"])
def products_kernel(
    flow,
    partial,
    rows,
    part_length,
    PRODUCTS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    FLOW_WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile `[BC, BC]` of a block's weight, over part_length · BN places.

    PRODUCTS has of each of a block's weights rows and columns, where its left and right begin in `flow`, and
    where it begins in a block's WEIGHTS numbers of `partial`; FIRST_TILES counts the tiles of those before.
    """
    layer = tl.program_id(1)
    part = tl.program_id(2)
    which = 0
    for i in tl.static_range(1, len(FIRST_TILES)):
        which += (tl.program_id(0) >= FIRST_TILES[i]).to(tl.int32)
    outs = pick_constant(PRODUCTS, which, 0, 5)
    ins = pick_constant(PRODUCTS, which, 1, 5)
    tile = tl.program_id(0) - pick_constant(FIRST_TILES, which)
    across = tl.cdiv(ins, BLOCK_C)
    index_o = tile // across * BLOCK_C + tl.arange(0, BLOCK_C)
    index_i = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
    left = matrix_at(flow, rows, layer * FLOW_WIDTH + pick_constant(PRODUCTS, which, 2, 5))
    right = matrix_at(flow, rows, layer * FLOW_WIDTH + pick_constant(PRODUCTS, which, 3, 5))
    sum_ = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
    start = part * part_length * BLOCK_N
    for begin in range(start, tl.minimum(start + part_length * BLOCK_N, rows), BLOCK_N):
        index_n = begin + tl.arange(0, BLOCK_N)
        a = load_tile(left, index_n, rows, index_o, outs, outs)  # [BN, BC]
        b = load_tile(right, index_n, rows, index_i, ins, ins)  # [BN, BC]
        sum_ = dot(tl.trans(a), b, sum_, PRECISION)
    base = partial + part.to(tl.int64) * SIZE + layer * WEIGHTS + pick_constant(PRODUCTS, which, 4, 5)
    store_tile(base, index_o, outs, index_i, ins, ins, sum_)


@triton.jit(do_not_specialize=["parts", "sequences", "stride", "unused"])
def sum_kernel(
    partial,
    vectors,
    gradients,
    parts,
    sequences,
    stride,
    unused,
    SIZE: tl.constexpr,
    MATRICES: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradients[i] `[SIZES[i]]` from STARTS[i] on, of `partial` where MATRICES[i], else of `vectors`.

    The first is the positions', whose first `unused` numbers no sequence reaches.
    """
    which = tl.program_id(1)
    size = pick_constant(SIZES, which)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < size:
        matrix = pick_constant(MATRICES, which)
        count = tl.where(matrix != 0, parts, sequences)
        step = tl.where(matrix != 0, SIZE, stride)
        skipped = tl.where(which == 0, unused, 0)
        mask = (index < size) & (index >= skipped)
        source = pick((vectors, partial), matrix) + pick_constant(STARTS, which) + index - skipped
        index_p = tl.arange(0, BLOCK_P)
        sum_ = tl.zeros([BLOCK_P, BLOCK], dtype=tl.float32)
        for begin in range(0, count, BLOCK_P):
            offset = (begin + index_p).to(tl.int64)[:, None] * step
            there = (begin + index_p < count)[:, None] & mask[None, :]
            sum_ += tl.load(source[None, :] + offset, mask=there, other=0.0)
        target = pick(gradients, which)
        tl.store(target + index, narrow(tl.sum(sum_, axis=0), target.dtype.element_ty), mask=index < size)
