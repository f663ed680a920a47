# mypy: disable-error-code="assignment"
"""The sequence encoder's forward: one program takes a sequence through every block, its rows in registers.

Weights are read over L2, a head's or BLOCK_F inner units' at a time. Nothing but the users is written, and
what the backward reads, where it will; tiles.py says where that lies and what SIZES, BLOCKS, … are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import activate, dot, narrow
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
    NARROW_BIAS,
    OUT,
    QUERY,
    VALUE,
    WIDEN,
    WIDEN_BIAS,
    affine,
    attention_shares,
    drop,
    kept_matrix,
    kept_scales,
    load_vector,
    matrix_at,
    normalise,
    weight_of,
)


@triton.jit
def attend(
    x,
    span,
    seen,
    blocks,
    layer,
    seed,
    kept,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All heads' attention and W_out on x `[BS, BD]`."""
    D: tl.constexpr = SIZES[0]
    HEADS: tl.constexpr = SIZES[1]
    H: tl.constexpr = D // HEADS
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    BLOCK_H: tl.constexpr = BLOCKS[2]
    DTYPE: tl.constexpr = x.dtype
    place, end, rows, places = span
    index_s = tl.arange(0, BLOCK_S)
    index_d = tl.arange(0, BLOCK_D)
    zero = tl.zeros([BLOCK_S, BLOCK_H], dtype=tl.float32)
    query = weight_of(blocks, layer, QUERY)
    key = weight_of(blocks, layer, KEY)
    value = weight_of(blocks, layer, VALUE)
    out = weight_of(blocks, layer, OUT)
    attended = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for head in range(HEADS):
        index_h = head * H + tl.arange(0, BLOCK_H)
        last = head * H + H
        q = dot(x, tl.trans(load_tile(query, index_h, last, index_d, D, D).to(DTYPE)), zero, PRECISION)
        k = dot(x, tl.trans(load_tile(key, index_h, last, index_d, D, D).to(DTYPE)), zero, PRECISION)
        v = dot(x, tl.trans(load_tile(value, index_h, last, index_d, D, D).to(DTYPE)), zero, PRECISION)
        p = attention_shares(narrow(q, DTYPE), narrow(k, DTYPE), seen, H**-0.5, PRECISION)  # [BS, BS]
        p = drop(p, seed, 3 * layer + 1, place, head * places + index_s, DROPOUT)
        mixed = dot(narrow(p, DTYPE), narrow(v, DTYPE), zero, PRECISION)  # [BS, BH]
        if kept is not None:
            store_tile(kept_matrix(kept, rows, layer, QUERY, SIZES), place, end, index_h, last, D, q)
            store_tile(kept_matrix(kept, rows, layer, KEY, SIZES), place, end, index_h, last, D, k)
            store_tile(kept_matrix(kept, rows, layer, VALUE, SIZES), place, end, index_h, last, D, v)
            store_tile(kept_matrix(kept, rows, layer, MIXED, SIZES), place, end, index_h, last, D, mixed)
        weight = load_tile(out, index_d, D, index_h, last, D).to(DTYPE)  # [BD, BH]
        attended = dot(narrow(mixed, DTYPE), tl.trans(weight), attended, PRECISION)
    return attended


@triton.jit
def feed_forward(
    x,
    span,
    blocks,
    layer,
    kept,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_narrow relu(W_widen x + b_widen) + b_narrow of x `[BS, BD]`."""
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    BLOCK_F: tl.constexpr = BLOCKS[3]
    DTYPE: tl.constexpr = x.dtype
    place, end, rows, _ = span
    index_d = tl.arange(0, BLOCK_D)
    widen = weight_of(blocks, layer, WIDEN)
    widen_bias = weight_of(blocks, layer, WIDEN_BIAS)
    narrowing = weight_of(blocks, layer, NARROW)
    bias = load_vector(weight_of(blocks, layer, NARROW_BIAS), index_d, D)
    forwarded = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32) + bias[None, :]
    for begin in range(0, F, BLOCK_F):
        index_f = begin + tl.arange(0, BLOCK_F)
        inner = tl.zeros([BLOCK_S, BLOCK_F], dtype=tl.float32) + load_vector(widen_bias, index_f, F)[None, :]
        inner = dot(x, tl.trans(load_tile(widen, index_f, F, index_d, D, D).to(DTYPE)), inner, PRECISION)
        inner = activate(inner, False)  # [BS, BF]
        if kept is not None:
            store_tile(kept_matrix(kept, rows, layer, INNER, SIZES), place, end, index_f, F, F, inner)
        weight = load_tile(narrowing, index_d, D, index_f, F, F).to(DTYPE)  # [BD, BF]
        forwarded = dot(narrow(inner, DTYPE), tl.trans(weight), forwarded, PRECISION)
    return forwarded


@triton.jit
def norm_and_keep(
    x,
    span,
    gain,
    bias,
    kept,
    start,
    norm,
    SIZES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    """LayerNorm of x `[BS, BD]`; its normalised rows are kept at `start`, their factors as norm's."""
    D: tl.constexpr = SIZES[0]
    place, end, rows, _ = span
    index_d = tl.arange(0, BLOCK_D)
    x, by = normalise(x, index_d < D, D, EPS)
    if kept is not None:
        store_tile(matrix_at(kept, rows, start), place, end, index_d, D, D, x)
        tl.store(kept_scales(kept, rows, norm, SIZES) + place, by, mask=place < end)
    return affine(x, gain, bias, index_d, D)


@triton.jit(do_not_specialize=["rows", "places"])
def forward_kernel(
    items,
    mask,
    position,
    norm,
    blocks,
    seed,
    users,
    kept,
    rows,
    places,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = SIZES[0]
    F: tl.constexpr = SIZES[2]
    BLOCK_S: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    index_s = tl.arange(0, BLOCK_S)
    index_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(0).to(tl.int64) * places + index_s
    end = tl.program_id(0).to(tl.int64) * places + places
    span = (place, end, rows, places)
    real = tl.load(mask + place, mask=index_s < places, other=0) != 0
    seen = real[None, :] & (index_s[None, :] <= index_s[:, None])  # [BS, BS]
    x = tl.load(
        items + place[:, None] * D + index_d[None, :], mask=real[:, None] & (index_d < D)[None, :], other=0.0
    ).to(tl.float32)
    x += load_tile(position + (SIZES[4] - places) * D, index_s, places, index_d, D, D).to(tl.float32)
    x = norm_and_keep(x, span, norm[0], norm[1], kept, 0, 0, SIZES, BLOCK_D, EPS)
    x = drop(x, seed, 0, place, index_d, DROPOUT)
    if kept is not None:
        store_tile(matrix_at(kept, rows, D), place, end, index_d, D, D, x)
    for layer in range(SIZES[3]):
        start = 2 * D + layer * (INNER * D + F)
        added = attend(
            narrow(x, DTYPE), span, seen, blocks, layer, seed, kept, SIZES, BLOCKS, DROPOUT, PRECISION
        )
        x += drop(added, seed, 3 * layer + 2, place, index_d, DROPOUT)
        gain = weight_of(blocks, layer, ATTENTION_GAIN)
        bias = weight_of(blocks, layer, ATTENTION_BIAS)
        at = start + ATTENDED * D
        x = norm_and_keep(x, span, gain, bias, kept, at, 2 * layer + 1, SIZES, BLOCK_D, EPS)
        added = feed_forward(narrow(x, DTYPE), span, blocks, layer, kept, SIZES, BLOCKS, PRECISION)
        x += drop(added, seed, 3 * layer + 3, place, index_d, DROPOUT)
        gain = weight_of(blocks, layer, FORWARD_GAIN)
        bias = weight_of(blocks, layer, FORWARD_BIAS)
        at = start + FORWARDED * D
        x = norm_and_keep(x, span, gain, bias, kept, at, 2 * layer + 2, SIZES, BLOCK_D, EPS)
    store_tile(users, place, end, index_d, D, D, tl.where(real[:, None], x, 0.0))
