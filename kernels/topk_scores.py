"""topk_scores in Triton: a sorted list of the k best per user, merged with one tile of scores after another.

A score and its id travel as one int64: the score's bits on top, in an order-preserving form, and the id's
complement below, so that sorting integers sorts by score and, among equal scores, by id. Most tiles hold
nothing better than a list's last entry: one comparison skips them, sorting and history filter included. Parts
of the catalogue run side by side where users are few; a second kernel merges their lists. Longer lists than a
tile can be are merged by torch's sort, a tile of torch's scores after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._blocks import cdiv, load_block, on_device, split
from crossan_fast.kernels._common import dot_precision, launch, power_of_two
from crossan_fast.kernels._ranking import Tile, best_tile, scores
from crossan_fast.ops.topk_scores import topk_scores_reference

# Entries of the longest list that is merged with a tile: of items of 64 numbers in bf16 that takes 70 KiB of
# shared memory, for twice as many 134 KiB, more than most GPUs have, and minutes of compiling.
MOST = 512

# The key of no candidate, below every other: −2^63 is no score's, whose top half is at least −(2^31 − 1).
EMPTY = tl.constexpr(-(2**63))
LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def to_keys(score, index_i):
    """Keys of scores that are numbers; their order is that of scores, then of falling ids."""
    score = tl.where(score == 0, 0.0, score)  # −0 ties with 0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (index_i ^ LAST_ID).to(tl.int64)


@triton.jit
def merge(best, other):
    """The better half of two lists in falling order, in falling order."""
    # One falling, one rising: the larger of each pair are the best, and one bitonic merge sorts them.
    other = tl.flip(other, 1)
    return tl.bitonic_merge(tl.where(best > other, best, other), descending=True)


@triton.jit(do_not_specialize=["batch", "columns", "history", "part_length"])
def topk_kernel(
    users,
    items,
    exclude,
    keys,
    batch,
    columns,
    width,
    history,
    part_length,
    BLOCK_U: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The best BLOCK_K of one part of the catalogue for one block of users."""
    part = tl.program_id(1)
    index_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    user = load_block(users, index_u, batch, width, BLOCK_D)  # [BU, d]
    best = tl.full([BLOCK_U, BLOCK_K], EMPTY, dtype=tl.int64)
    last = tl.full([BLOCK_U], EMPTY, dtype=tl.int64)
    start = part * part_length * BLOCK_I
    stop = tl.minimum(start + part_length * BLOCK_I, columns)
    for begin in range(start, stop, BLOCK_I):
        index_i = begin + tl.arange(0, BLOCK_I)
        item = load_block(items, index_i, columns, width, BLOCK_D)  # [BI, d]
        score = scores(user, item, PRECISION, BLOCK_U, BLOCK_I)  # [BU, BI]
        candidate = ((index_i > 0) & (index_i < columns))[None, :] & (score > float("-inf"))
        key = tl.where(candidate, to_keys(score, index_i[None, :]), EMPTY)
        better = (key > last[:, None]) & (index_u < batch)[:, None]
        if tl.max(tl.max(better.to(tl.int32), axis=1), axis=0) > 0:
            pointer = exclude + index_u.to(tl.int64) * history
            for place in range(history):
                excluded = tl.load(pointer + place, mask=index_u < batch, other=0)
                key = tl.where(excluded[:, None] == index_i[None, :], EMPTY, key)
            best = merge(best, tl.topk(key, BLOCK_K))  # [BU, BK]
            last = tl.min(best, axis=1)
    place = tl.arange(0, BLOCK_K)
    offset = (part.to(tl.int64) * batch + index_u)[:, None] * BLOCK_K + place[None, :]
    tl.store(keys + offset, best, mask=(index_u < batch)[:, None] & (place < BLOCK_K)[None, :])


@triton.jit(do_not_specialize=["batch", "parts", "k"])
def merge_kernel(keys, out_scores, out_ids, batch, parts, k, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr):
    """Merge the parts' lists, and take keys apart again."""
    index_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    index_k = tl.arange(0, BLOCK_K)
    offset = index_u.to(tl.int64)[:, None] * BLOCK_K + index_k[None, :]
    mask_uk = (index_u < batch)[:, None] & (index_k < BLOCK_K)[None, :]
    best = tl.load(keys + offset, mask=mask_uk, other=EMPTY)  # [BU, BK]
    for _ in range(1, parts):
        offset += tl.cast(batch, tl.int64) * BLOCK_K
        best = merge(best, tl.load(keys + offset, mask=mask_uk, other=EMPTY))
    ordered = (best >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    empty = best == EMPTY
    score = tl.where(empty, float("-inf"), score).to(out_scores.dtype.element_ty)
    item = tl.where(empty, 0, (best & LAST_ID) ^ LAST_ID)
    offset = index_u.to(tl.int64)[:, None] * k + index_k[None, :]
    mask = mask_uk & (index_k < k)[None, :]
    tl.store(out_scores + offset, score, mask=mask)
    tl.store(out_ids + offset, item, mask=mask)


def tile(dtype: torch.dtype, tf32: bool, k: int) -> Tile:
    """The default tile: at least as many items as a list's entries, on warps that hold both in registers."""
    entries = power_of_two(k)
    if entries <= 64:
        return Tile(16, 64, 4, 2)
    if dtype == torch.float32 and not tf32:
        # A product without matrix instructions keeps its operands in registers too.
        return Tile(16, entries, min(16, entries // 16), 2 if entries <= 128 else 1)
    return Tile(16, max(256, entries), 8, 2)


def forward(users: Tensor, items: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scores `[B, k]` in the users' dtype, int64 ids `[B, k]`); see `topk_scores_reference`.

    A score that is NaN makes its item no candidate.
    """
    if k > MOST:
        found = topk_scores_reference(users, items, k, exclude)
        return found.scores, found.ids
    first = tile(users.dtype, dot_precision(users.dtype) == "tf32", k)
    choices = [first, first._replace(users=32), first._replace(warps=8 if first.warps == 4 else 4)]
    history = 0 if exclude is None else exclude.shape[1]
    inputs = (users, items, k, exclude)
    best = best_tile("topk_scores", choices, users, items, lambda tile: _forward(tile, *inputs), k, history)
    return _forward(best, *inputs)


def _forward(
    tile: Tile, users: Tensor, items: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, width = users.shape
    columns, history = items.shape[0], 0 if exclude is None else exclude.shape[1]
    scores, ids = users.new_empty((batch, k)), users.new_empty((batch, k), dtype=torch.int64)
    if batch == 0:
        return scores, ids
    block_u, block_i, warps, stages = tile
    block_k = power_of_two(k)
    blocks = cdiv(batch, block_u)
    parts, length = split(blocks, cdiv(columns, block_i))
    keys = users.new_empty((parts, batch, block_k), dtype=torch.int64)
    with on_device(users):
        launch(
            topk_kernel,
            (blocks, parts),
            users.contiguous(),
            items.contiguous(),
            ids if exclude is None else exclude.contiguous(),
            keys,
            batch,
            columns,
            width,
            history,
            length,
            BLOCK_U=block_u,
            BLOCK_I=block_i,
            BLOCK_K=block_k,
            BLOCK_D=power_of_two(width),
            PRECISION=dot_precision(users.dtype),
            num_warps=warps,
            num_stages=stages,
        )
        launch(
            merge_kernel,
            (cdiv(batch, 4),),
            keys,
            scores,
            ids,
            batch,
            parts,
            k,
            BLOCK_U=4,
            BLOCK_K=block_k,
        )
    return scores, ids
