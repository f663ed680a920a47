# mypy: disable-error-code="assignment"
"""The sequence encoder's backward over places: one program takes a sequence back through every block.

It finishes the gradient of the items, and leaves what the weights' needs, summed over all places by
weight_gradient_kernels.py:

    flow      of each place, laid out as `kept`, of each block the gradients of query's, key's, value's, out's
              and narrow's products [D], what entered the block, mixed, what entered widen [D], inner and the
              gradient of widen's product [F]: both sides of every weight's gradient, in the compute dtype
    vectors   of each sequence, what it adds to the gradients of gains, biases and positions (`VECTORS…`)

Dropout's mask is drawn again, attention's shares are computed again from the kept q and k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import dot, narrow
from crossan_fast.kernels.sequence_encoder.tiles import (
    ATTENDED,
    ATTENTION_BIAS,
    ATTENTION_GAIN,
    FORWARD_BIAS,
    FORWARD_GAIN,
    FORWARDED,
    INNER,
    KEY,
    MIXED,
    NARROW,
    OUT,
    QUERY,
    VALUE,
    WIDEN,
    affine,
    attention_shares,
    drop,
    kept_matrix,
    kept_scales,
    load_vector,
    matrix_at,
    normalise_backward,
    weight_of,
)

# Places in `flow` of a block, in units of D; the first four and MIXED as in `kept`.
FLOW_OUT = tl.constexpr(3)
FLOW_NARROW = tl.constexpr(4)
FLOW_IN = tl.constexpr(5)
FLOW_MIXED = tl.constexpr(6)
FLOW_ATTENDED = tl.constexpr(7)
FLOW_WIDTHS = tl.constexpr(8)  # of D; INNER and the gradient of widen's product, of F, follow

# Places in `vectors` of a block, in units of D; widen_bias [F] follows the last.
VECTOR_WIDTHS = tl.constexpr(5)


@triton.jit
def flow_matrix(flow, rows, layer, PLACE: tl.constexpr, INNERS: tl.constexpr, SIZES: tl.constexpr):
    """A block's matrix in `flow`, PLACE matrices of D and INNERS of F after its first."""
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    return matrix_at(flow, rows, layer * (FLOW_WIDTHS * D + 2 * F) + PLACE * D + INNERS * F)


@triton.jit
def norm_backward(
    grad,
    normed,
    by,
    gain,
    sums,
    SIZES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of what a LayerNorm took, `[BS, BD]`; those of gain and bias go to `sums`."""
    D: tl.constexpr = SIZES[0]
    index_d = tl.arange(0, BLOCK_D)
    mask_d = index_d < D
    tl.store(sums + index_d, tl.sum(grad * normed, axis=0), mask=mask_d)
    tl.store(sums + D + index_d, tl.sum(grad, axis=0), mask=mask_d)
    return normalise_backward(grad, normed, by, load_vector(gain, index_d, D), mask_d, D)


@triton.jit
def feed_forward_backward(
    grad,
    span,
    blocks,
    layer,
    kept,
    flow,
    sums,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of x `[BS, BD]` from that of W_narrow's product; b_widen's goes to `sums`."""
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    BLOCK_F: tl.constexpr = BLOCKS[3]
    DTYPE: tl.constexpr = grad.dtype
    place, end, rows, _ = span
    index_d = tl.arange(0, BLOCK_D)
    widen = weight_of(blocks, layer, WIDEN)
    narrowing = weight_of(blocks, layer, NARROW)
    kept_inner = kept_matrix(kept, rows, layer, INNER, SIZES)
    grad_x = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for begin in range(0, F, BLOCK_F):
        index_f = begin + tl.arange(0, BLOCK_F)
        weight = load_tile(narrowing, index_d, D, index_f, F, F).to(DTYPE)  # [BD, BF]
        grad_inner = dot(grad, weight, tl.zeros([BLOCK_S, BLOCK_F], dtype=tl.float32), PRECISION)
        inner = load_tile(kept_inner, place, end, index_f, F, F)  # [BS, BF]
        grad_inner = tl.where(inner <= 0, 0.0, grad_inner)
        tl.store(sums + index_f, tl.sum(grad_inner, axis=0), mask=index_f < F)
        grad_inner = narrow(grad_inner, DTYPE)
        store_tile(flow_matrix(flow, rows, layer, FLOW_WIDTHS, 0, SIZES), place, end, index_f, F, F, inner)
        store_tile(
            flow_matrix(flow, rows, layer, FLOW_WIDTHS, 1, SIZES), place, end, index_f, F, F, grad_inner
        )
        weight = load_tile(widen, index_f, F, index_d, D, D).to(DTYPE)  # [BF, BD]
        grad_x = dot(grad_inner, weight, grad_x, PRECISION)
    return grad_x


@triton.jit
def attend_backward(
    grad,
    span,
    seen,
    blocks,
    layer,
    seed,
    kept,
    flow,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of x `[BS, BD]` by way of q, k and v, from that of W_out's product."""
    D: tl.constexpr = SIZES[0]
    HEADS: tl.constexpr = SIZES[1]
    H: tl.constexpr = D // HEADS
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    BLOCK_H: tl.constexpr = BLOCKS[2]
    SCALE: tl.constexpr = H**-0.5
    DTYPE: tl.constexpr = grad.dtype
    place, end, rows, places = span
    index_s = tl.arange(0, BLOCK_S)
    index_d = tl.arange(0, BLOCK_D)
    zero = tl.zeros([BLOCK_S, BLOCK_H], dtype=tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    grad_x = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for head in range(HEADS):
        index_h = head * H + tl.arange(0, BLOCK_H)
        last = head * H + H
        out = load_tile(weight_of(blocks, layer, OUT), index_d, D, index_h, last, D).to(DTYPE)  # [BD, BH]
        grad_mixed = narrow(dot(grad, out, zero, PRECISION), DTYPE)  # [BS, BH]
        q = load_tile(kept_matrix(kept, rows, layer, QUERY, SIZES), place, end, index_h, last, D)
        k = load_tile(kept_matrix(kept, rows, layer, KEY, SIZES), place, end, index_h, last, D)
        v = load_tile(kept_matrix(kept, rows, layer, VALUE, SIZES), place, end, index_h, last, D)
        q, k, v = narrow(q, DTYPE), narrow(k, DTYPE), narrow(v, DTYPE)
        p = attention_shares(q, k, seen, SCALE, PRECISION)  # [BS, BS]
        site, column = 3 * layer + 1, head * places + index_s
        grad_p = drop(dot(grad_mixed, tl.trans(v), square, PRECISION), seed, site, place, column, DROPOUT)
        grad_score = SCALE * p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None])
        grad_score = narrow(grad_score, DTYPE)
        p = narrow(drop(p, seed, site, place, column, DROPOUT), DTYPE)
        grad_q = narrow(dot(grad_score, k, zero, PRECISION), DTYPE)
        grad_k = narrow(dot(tl.trans(grad_score), q, zero, PRECISION), DTYPE)
        grad_v = narrow(dot(tl.trans(p), grad_mixed, zero, PRECISION), DTYPE)
        store_tile(flow_matrix(flow, rows, layer, QUERY, 0, SIZES), place, end, index_h, last, D, grad_q)
        store_tile(flow_matrix(flow, rows, layer, KEY, 0, SIZES), place, end, index_h, last, D, grad_k)
        store_tile(flow_matrix(flow, rows, layer, VALUE, 0, SIZES), place, end, index_h, last, D, grad_v)
        query = load_tile(weight_of(blocks, layer, QUERY), index_h, last, index_d, D, D).to(DTYPE)
        key = load_tile(weight_of(blocks, layer, KEY), index_h, last, index_d, D, D).to(DTYPE)
        value = load_tile(weight_of(blocks, layer, VALUE), index_h, last, index_d, D, D).to(DTYPE)
        grad_x = dot(grad_q, query, grad_x, PRECISION)
        grad_x = dot(grad_k, key, grad_x, PRECISION)
        grad_x = dot(grad_v, value, grad_x, PRECISION)
    return grad_x


@triton.jit(do_not_specialize=["rows", "places"])
def backward_kernel(
    grad_users,
    kept,
    mask,
    norm,
    blocks,
    seed,
    grad_items,
    flow,
    vectors,
    rows,
    places,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    LAYERS: tl.constexpr = SIZES[3]
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    VECTORS: tl.constexpr = 2 * D + LAYERS * (VECTOR_WIDTHS * D + F)
    sequence = tl.program_id(0).to(tl.int64)
    index_s = tl.arange(0, BLOCK_S)
    index_d = tl.arange(0, BLOCK_D)
    place, end = sequence * places + index_s, sequence * places + places
    exists = index_s < places
    span = (place, end, rows, places)
    own = vectors + sequence * (VECTORS + places * D)
    real = tl.load(mask + place, mask=exists, other=0) != 0
    seen = real[None, :] & (index_s[None, :] <= index_s[:, None])  # [BS, BS]
    mask_sd = real[:, None] & (index_d < D)[None, :]
    grad = tl.load(grad_users + place[:, None] * D + index_d[None, :], mask=mask_sd, other=0.0).to(tl.float32)
    for step in range(LAYERS):
        layer = LAYERS - 1 - step
        sums = own + 2 * D + layer * (VECTOR_WIDTHS * D + F)
        normed = load_tile(kept_matrix(kept, rows, layer, FORWARDED, SIZES), place, end, index_d, D, D)
        by = tl.load(kept_scales(kept, rows, 2 * layer + 2, SIZES) + place, mask=exists, other=0.0)
        gain = weight_of(blocks, layer, FORWARD_GAIN)
        if layer + 1 < LAYERS:
            bias = weight_of(blocks, layer, FORWARD_BIAS)
            x = affine(normed, gain, bias, index_d, D)
            store_tile(flow_matrix(flow, rows, layer + 1, FLOW_IN, 0, SIZES), place, end, index_d, D, D, x)
        grad = norm_backward(grad, normed, by, gain, sums + 2 * D, SIZES, BLOCK_D)

        dropped = drop(grad, seed, 3 * layer + 3, place, index_d, DROPOUT)
        tl.store(sums + 4 * D + index_d, tl.sum(dropped, axis=0), mask=index_d < D)
        dropped = narrow(dropped, DTYPE)
        store_tile(flow_matrix(flow, rows, layer, FLOW_NARROW, 0, SIZES), place, end, index_d, D, D, dropped)
        normed = load_tile(kept_matrix(kept, rows, layer, ATTENDED, SIZES), place, end, index_d, D, D)
        by = tl.load(kept_scales(kept, rows, 2 * layer + 1, SIZES) + place, mask=exists, other=0.0)
        gain = weight_of(blocks, layer, ATTENTION_GAIN)
        x = affine(normed, gain, weight_of(blocks, layer, ATTENTION_BIAS), index_d, D)
        store_tile(flow_matrix(flow, rows, layer, FLOW_ATTENDED, 0, SIZES), place, end, index_d, D, D, x)
        bias_sums = sums + VECTOR_WIDTHS * D
        grad += feed_forward_backward(
            dropped, span, blocks, layer, kept, flow, bias_sums, SIZES, BLOCKS, PRECISION
        )
        grad = norm_backward(grad, normed, by, gain, sums, SIZES, BLOCK_D)

        dropped = narrow(drop(grad, seed, 3 * layer + 2, place, index_d, DROPOUT), DTYPE)
        store_tile(flow_matrix(flow, rows, layer, FLOW_OUT, 0, SIZES), place, end, index_d, D, D, dropped)
        mixed = load_tile(kept_matrix(kept, rows, layer, MIXED, SIZES), place, end, index_d, D, D)
        store_tile(flow_matrix(flow, rows, layer, FLOW_MIXED, 0, SIZES), place, end, index_d, D, D, mixed)
        grad += attend_backward(
            dropped, span, seen, blocks, layer, seed, kept, flow, SIZES, BLOCKS, DROPOUT, PRECISION
        )
    x = load_tile(matrix_at(kept, rows, D), place, end, index_d, D, D)
    store_tile(flow_matrix(flow, rows, 0, FLOW_IN, 0, SIZES), place, end, index_d, D, D, x)
    normed = load_tile(kept, place, end, index_d, D, D)
    by = tl.load(kept_scales(kept, rows, 0, SIZES) + place, mask=exists, other=0.0)
    grad = drop(grad, seed, 0, place, index_d, DROPOUT)
    grad = norm_backward(grad, normed, by, norm[0], own, SIZES, BLOCK_D)
    store_tile(own + VECTORS, index_s, places, index_d, D, D, grad)
    store_tile(grad_items, place, end, index_d, D, D, tl.where(real[:, None], grad, 0.0))
