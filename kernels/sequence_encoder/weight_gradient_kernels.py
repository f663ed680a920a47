# mypy: disable-error-code="assignment"
"""The sequence encoder's weight gradients: sums over all places, of matrices and of vectors, in one launch.

A matrix's gradient is leftᵀ right of two matrices of `flow` (backward_kernels.py). A program owns a tile of
one; a vector's is the sum over sequences of their shares in `vectors`, a program some numbers of one. Many
places are cut into parts: then tiles go to `partial`, `[parts, SIZE]`, a part of which holds all matrices in
weights' order, and `sum_kernel` adds up the parts. Every sum has its order: no atomics, bits repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import dot, narrow, pick, pick_constant
from crossan_fast.kernels.sequence_encoder.tiles import matrix_at


@triton.jit
def which_of(index, FIRSTS: tl.constexpr):
    """In whose share an index lies: FIRSTS says where each begins."""
    which = 0
    for i in tl.static_range(1, len(FIRSTS)):
        which += (index >= FIRSTS[i]).to(tl.int32)
    return which


@triton.jit
def add_up(source, count, step, mask, dtype: tl.constexpr, BLOCK_P: tl.constexpr):
    """Σ_p source[p · step], p < count, of pointers `source` `[B]`, in `dtype`."""
    index_p = tl.arange(0, BLOCK_P)
    sum_ = tl.zeros([BLOCK_P, source.shape[0]], dtype=tl.float32)
    for begin in range(0, count, BLOCK_P):
        offset = (begin + index_p).to(tl.int64)[:, None] * step
        there = (begin + index_p < count)[:, None] & mask[None, :]
        sum_ += tl.load(source[None, :] + offset, mask=there, other=0.0)
    return narrow(tl.sum(sum_, axis=0), dtype)


@triton.jit(do_not_specialize=["rows", "part_length", "sequences", "stride", "unused"])
def sums_kernel(
    flow,
    vectors,
    partial,
    matrix_gradients,
    vector_gradients,
    rows,
    part_length,
    sequences,
    stride,
    unused,
    LAYERS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    FLOW_WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    FIRST_CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile `[BC, BC]` of a block's matrix over part_length · BN places, or BLOCK numbers of a vector.

    Programs first take the tiles, block by block, then the vectors.

    PRODUCTS has of each of a block's matrices rows and columns, where its left and right begin in `flow`, and
    where it begins in a block's WEIGHTS numbers of `partial`; FIRST_TILES counts the tiles of those before,
    its end all of them. STARTS and SIZES say where in a sequence's share each vector's numbers begin, and how
    many there are; FIRST_CHUNKS counts the programs of those before. The first vector is the positions', of
    which no sequence reaches the first `unused` numbers.
    """
    part = tl.program_id(1)
    TILES: tl.constexpr = FIRST_TILES[len(FIRST_TILES) - 1]
    if tl.program_id(0) < TILES * LAYERS:
        layer = tl.program_id(0) // TILES
        tile = tl.program_id(0) % TILES
        which = which_of(tile, FIRST_TILES)
        outs = pick_constant(PRODUCTS, which, 0, 5)
        ins = pick_constant(PRODUCTS, which, 1, 5)
        tile -= pick_constant(FIRST_TILES, which)
        across = tl.cdiv(ins, BLOCK_C)
        index_o = tile // across * BLOCK_C + tl.arange(0, BLOCK_C)
        index_i = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
        left = matrix_at(flow, rows, layer * FLOW_WIDTH + pick_constant(PRODUCTS, which, 2, 5))
        right = matrix_at(flow, rows, layer * FLOW_WIDTH + pick_constant(PRODUCTS, which, 3, 5))
        product = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
        start = part * part_length * BLOCK_N
        for begin in range(start, tl.minimum(start + part_length * BLOCK_N, rows), BLOCK_N):
            index_n = begin + tl.arange(0, BLOCK_N)
            a = load_tile(left, index_n, rows, index_o, outs, outs)  # [BN, BC]
            b = load_tile(right, index_n, rows, index_i, ins, ins)  # [BN, BC]
            product = dot(tl.trans(a), b, product, PRECISION)
        if partial is None:
            target = pick(matrix_gradients, layer * (len(PRODUCTS) // 5) + which)
            store_tile(target, index_o, outs, index_i, ins, ins, product)
        else:
            at = partial + part.to(tl.int64) * LAYERS * WEIGHTS + layer * WEIGHTS
            at += pick_constant(PRODUCTS, which, 4, 5)
            store_tile(at, index_o, outs, index_i, ins, ins, product)
    elif part == 0:
        chunk = tl.program_id(0) - TILES * LAYERS
        vector = which_of(chunk, FIRST_CHUNKS)
        index = (chunk - pick_constant(FIRST_CHUNKS, vector)) * BLOCK + tl.arange(0, BLOCK)
        size = pick_constant(SIZES, vector)
        skipped = tl.where(vector == 0, unused, 0)
        source = vectors + pick_constant(STARTS, vector) + index - skipped
        there = (index < size) & (index >= skipped)
        gradient = pick(vector_gradients, vector)
        sum_ = add_up(source, sequences, stride, there, gradient.dtype.element_ty, BLOCK_P)
        tl.store(gradient + index, sum_, mask=index < size)


@triton.jit(do_not_specialize=["parts"])
def sum_kernel(
    partial,
    gradients,
    parts,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradients[i] `[SIZES[i]]`, whose numbers begin at STARTS[i] of a part."""
    which = tl.program_id(1)
    size = pick_constant(SIZES, which)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < size:
        source = partial + pick_constant(STARTS, which) + index
        gradient = pick(gradients, which)
        sum_ = add_up(source, parts, SIZE, index < size, gradient.dtype.element_ty, BLOCK_P)
        tl.store(gradient + index, sum_, mask=index < size)
