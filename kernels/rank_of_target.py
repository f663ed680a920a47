"""rank_of_target in Triton: one walk over the catalogue per block of users, counting what is ahead.

rank = 1 + #{j ≠ t : score_j ≥ score_t}, over the ids that are not excluded. The target's score comes from a
product of the very shape that scores the catalogue, of the users with the gathered targets, whose diagonal is
kept: items with the target's embedding then tie with it exactly. Excluded ids are not compared with every id;
they are scored in the same way and taken off the count, once each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels import _ranking
from crossan_fast.kernels._blocks import cdiv, load_block, on_device, split
from crossan_fast.kernels._common import dot_precision, launch, power_of_two
from crossan_fast.kernels._ranking import Tile, best_tile, scores


@triton.jit
def scores_of_own(
    user,
    items,
    ids,
    columns,
    width,
    PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The score of one item per user, `ids [BLOCK_I]`: user i's own is `ids[i]`."""
    item = load_block(items, ids, columns, width, BLOCK_D)  # [BI, d]
    score = scores(user, item, PRECISION, BLOCK_U, BLOCK_I)  # [BU, BI]
    diagonal = tl.arange(0, BLOCK_U)[:, None] == tl.arange(0, BLOCK_I)[None, :]
    return tl.max(tl.where(diagonal, score, float("-inf")), axis=1)


@triton.jit(do_not_specialize=["batch", "columns", "history", "part_length"])
def rank_kernel(
    users,
    items,
    targets,
    exclude,
    ranks,
    batch,
    columns,
    width,
    history,
    part_length,
    BLOCK_U: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of one block of users' ranks that one part of the catalogue adds."""
    part = tl.program_id(1)
    index_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask_u = index_u < batch
    # Users once more, for loads of one id per user into a block of BLOCK_I items; past BLOCK_U there is none.
    lane = tl.arange(0, BLOCK_I)
    own = tl.program_id(0) * BLOCK_U + lane
    own_mask = (lane < BLOCK_U) & (own < batch)
    user = load_block(users, index_u, batch, width, BLOCK_D)  # [BU, d]
    target = tl.load(targets + index_u, mask=mask_u, other=0)
    own_target = tl.load(targets + own, mask=own_mask, other=0)
    bar = scores_of_own(user, items, own_target, columns, width, PRECISION, BLOCK_U, BLOCK_I, BLOCK_D)
    pointer = exclude + index_u.to(tl.int64) * history
    for place in range(history):
        excluded = tl.load(pointer + place, mask=mask_u, other=0)
        bar = tl.where(excluded == target, float("-inf"), bar)

    ahead = tl.where(mask_u & (part == 0), 1, 0).to(tl.int64)
    start = part * part_length * BLOCK_I
    stop = tl.minimum(start + part_length * BLOCK_I, columns)
    for begin in range(start, stop, BLOCK_I):
        index_i = begin + tl.arange(0, BLOCK_I)
        item = load_block(items, index_i, columns, width, BLOCK_D)  # [BI, d]
        score = scores(user, item, PRECISION, BLOCK_U, BLOCK_I)  # [BU, BI]
        candidate = ((index_i > 0) & (index_i < columns))[None, :] & (index_i[None, :] != target[:, None])
        ahead += tl.sum((candidate & (score >= bar[:, None])).to(tl.int32), axis=1)

    # With a bar of −inf the excluded, of score −inf themselves, stay ahead: ties count against the target.
    finite = bar > float("-inf")
    own_pointer = exclude + own.to(tl.int64) * history
    for place in range(part, history, tl.num_programs(1)):
        excluded = tl.load(pointer + place, mask=mask_u, other=0)
        own_excluded = tl.load(own_pointer + place, mask=own_mask, other=0)
        own_excluded = tl.where(own_excluded < 0, columns, own_excluded)  # no id: not read, either
        score = scores_of_own(user, items, own_excluded, columns, width, PRECISION, BLOCK_U, BLOCK_I, BLOCK_D)
        counted = finite & (excluded > 0) & (excluded < columns) & (score >= bar)
        for earlier in range(place):
            counted = counted & (tl.load(pointer + earlier, mask=mask_u, other=0) != excluded)
        ahead -= counted.to(tl.int64)
    tl.store(ranks + part.to(tl.int64) * batch + index_u, ahead, mask=mask_u)


def forward(users: Tensor, items: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """int64 ranks `[B]`, 1 … I; see `rank_of_target_reference` for the arguments."""
    batch, width = users.shape
    if batch == 0:
        return targets.new_empty(0)
    first = _ranking.tile(users.dtype, width, dot_precision(users.dtype) == "tf32")
    choices = [first, first._replace(warps=8 if first.warps == 4 else 4), first._replace(stages=1)]
    inputs = (users, items, targets, exclude)
    history = 0 if exclude is None else exclude.shape[1]
    tile = best_tile("rank_of_target", choices, users, items, lambda tile: _forward(tile, *inputs), history)
    return _forward(tile, *inputs)


def _forward(tile: Tile, users: Tensor, items: Tensor, targets: Tensor, exclude: Tensor | None) -> Tensor:
    block_u, block_i, warps, stages = tile
    batch, width = users.shape
    columns, history = items.shape[0], 0 if exclude is None else exclude.shape[1]
    precision = dot_precision(users.dtype)
    blocks = cdiv(batch, block_u)
    parts, length = split(blocks, cdiv(columns, block_i))
    ranks = targets.new_empty((parts, batch))
    with on_device(users):
        launch(
            rank_kernel,
            (blocks, parts),
            users.contiguous(),
            items.contiguous(),
            targets.contiguous(),
            targets if exclude is None else exclude.contiguous(),
            ranks,
            batch,
            columns,
            width,
            history,
            length,
            BLOCK_U=block_u,
            BLOCK_I=block_i,
            BLOCK_D=power_of_two(width),
            PRECISION=precision,
            num_warps=warps,
            num_stages=stages,
        )
    return ranks.sum(0) if parts > 1 else ranks.view(batch)
