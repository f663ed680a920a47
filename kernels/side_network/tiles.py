# ruff: noqa: RUF005  (Triton's tuples have no starred form)
# mypy: disable-error-code="assignment"
"""Reading sources and mixing them: the device functions that both passes of the side network share.

A *source* of a tower is a tensor `[rows, L, D]` whose state at each level enters the tower's sum with a
coefficient: the modality's own states, another modality's (cross), or a chunk's derived states (a
projection of states). Names: N items, D width, K sources of a
tower, T towers of a launch, S slots (distinct source tensors of a launch); tiles are `[BN, BD]` (items × a
chunk of the width).
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._common import pick, pick_constant


@triton.jit
def open_sources(read, presence, tower, index_n, mask_n, GROUP: tl.constexpr, K: tl.constexpr):
    """Per source of this tower: row pointers [BN], rows to read [BN], level stride, scale pointers [BN].

    `read` and `presence` are `plan.Group.read` and `parameters.Items.presence`, GROUP is
    `plan.Group.constants`: SLOTS[t·K + k] is the tensor that tower t reads as source k (−1: none), COLUMNS
    the modality whose presence it needs (−1: none), GATHERED[slot] whether item ids choose its rows. With
    STATIC every tower reads the same slots, so that pointers of different types may stand side by side;
    otherwise they are picked.
    """
    states, row_strides, level_strides, scales, scale_strides, ids = read
    present, present_stride = presence
    SLOTS: tl.constexpr = GROUP[1]
    COLUMNS: tl.constexpr = GROUP[2]
    GATHERED: tl.constexpr = GROUP[3]
    STATIC: tl.constexpr = GROUP[4]
    local = index_n.to(tl.int64)
    if ids is None:
        chosen = local
    else:
        chosen = tl.load(ids + index_n, mask=mask_n, other=0).to(tl.int64)
    pointers = ()
    masks = ()
    strides = ()
    scale_pointers = ()
    for k in tl.static_range(K):
        mask = mask_n
        if present is not None:
            column = pick_constant(COLUMNS, tower, k, K) + tl.zeros_like(index_n)
            flags = tl.load(present + local * present_stride + column, mask=mask_n & (column >= 0), other=1)
            mask = mask & (flags != 0)
        if STATIC:
            if SLOTS[k] < 0:
                mask = mask_n & (index_n < 0)
            base = states[any_slot(SLOTS, k)]
            stride = row_strides[any_slot(SLOTS, k)] + tl.zeros((), tl.int64)
            strides = strides + (level_strides[any_slot(SLOTS, k)],)
            rows = chosen if GATHERED[any_slot(SLOTS, k)] else local
            if scales[any_slot(SLOTS, k)] is None:
                scale_pointers = scale_pointers + (rows,)  # no pointer: not scaled
            else:
                scale = scales[any_slot(SLOTS, k)]
                scale_pointers = scale_pointers + (scale + rows * scale_strides[any_slot(SLOTS, k)],)
        else:
            slot_k = pick_constant(SLOTS, tower, k, K)
            mask = mask & (slot_k + tl.zeros_like(index_n) >= 0)
            base = pick(states, slot_k)
            stride = pick_integer(row_strides, slot_k)
            strides = strides + (pick_integer(level_strides, slot_k),)
            rows = chosen if GATHERED[0] else local
            if scales[0] is None:
                scale_pointers = scale_pointers + (rows,)  # no pointer: not scaled
            else:
                scale_stride = pick_integer(scale_strides, slot_k)
                scale_pointers = scale_pointers + (pick(scales, slot_k) + rows * scale_stride,)
        pointers = pointers + (base + rows * stride,)
        masks = masks + (mask,)
    return pointers, masks, strides, scale_pointers


@triton.constexpr_function
def any_slot(slots, k):
    """The slot of source k; where there is none, one that may be pointed at."""
    return max(slots[k], 0)


@triton.jit
def pick_integer(values, index):
    """values[index] of a tuple of launch integers, some of them compile-time constants, as int64."""
    chosen = values[0] + tl.zeros((), tl.int64)
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def exists_mask(presence, tower, index_n, mask_n, GROUP: tl.constexpr):
    """[BN]: the item has a source of this tower (either of a pair's two)."""
    present, present_stride = presence
    if present is None:
        return mask_n
    else:
        FIRST: tl.constexpr = GROUP[5]
        SECOND: tl.constexpr = GROUP[6]
        pointer = present + index_n.to(tl.int64) * present_stride
        first = tl.load(pointer + pick_constant(FIRST, tower), mask=mask_n, other=0)
        second = tl.load(pointer + pick_constant(SECOND, tower), mask=mask_n, other=0)
        return mask_n & ((first != 0) | (second != 0))


@triton.jit
def read_level(pointers, masks, index_d, mask_d, K: tl.constexpr):
    """The stored tiles of the level that `pointers` are at, one [BN, BD] per source; 0 where absent."""
    tiles = ()
    for k in tl.static_range(K):
        pointer = pointers[k][:, None] + index_d[None, :]
        tiles = tiles + (tl.load(pointer, mask=masks[k][:, None] & mask_d[None, :], other=0),)
    return tiles


@triton.jit
def advance(pointers, strides, K: tl.constexpr):
    """The pointers a level further. Not `level · stride` each time: L·K products would wait in registers."""
    moved = ()
    for k in tl.static_range(K):
        moved = moved + (pointers[k] + strides[k],)
    return moved


@triton.jit
def decode(tile):
    """fp32 values of stored ones; e4m3 bytes become halves 256 times too small, then are put right."""
    if tile.dtype == tl.uint8:
        bits = tile.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return tile.to(tl.float32)


@triton.jit
def source_value(tiles, scale_pointers, masks, level, k: tl.constexpr):
    """Source k of this level in fp32 [BN, BD]."""
    value = decode(tiles[k])  # [BN, BD]
    if scale_pointers[k].dtype.is_ptr():
        scale = tl.load(scale_pointers[k] + level, mask=masks[k], other=0.0)  # [BN]
        value = value * scale[:, None]
    return value


@triton.jit
def mix(x, tiles, scale_pointers, masks, coef, level, K: tl.constexpr):
    """x + Σ_k coef[level, k] · source k, in fp32 [BN, BD]; coef points at this tower's [L, K]."""
    for k in tl.static_range(K):
        value = source_value(tiles, scale_pointers, masks, level, k)
        x += value * tl.load(coef + level * K + k)
    return x


@triton.jit
def sum_splits(pointer, mask, splits, split_stride):
    """Partial products at `pointer` (a tile), summed over the splits of D in a fixed order."""
    total = tl.load(pointer, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(pointer + split * split_stride, mask=mask, other=0.0)
    return total
