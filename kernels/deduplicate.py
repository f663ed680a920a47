"""deduplicate in Triton: two kernels that compare every place with every other, in place of a sort.

A place is its id's *first* where no earlier one holds the id. *mark* finds firsts and how often their ids
occur; *place* counts for each place the firsts of smaller ids, which is its slot. P places cost 2 P²
comparisons: less than a launch takes for 704, an estimated 70 µs of an H100 for the most that are served so.
Torch's sort, scan and scatters, which run for more, are 13 ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._blocks import cdiv, on_device
from crossan_fast.kernels._common import launch
from crossan_fast.ops.deduplicate import deduplicate_reference, deduplicate_without_waiting

# Places, or slots, beyond which comparing all pairs would take longer than sorting.
MOST = 16_384
_BLOCK_P, _BLOCK_J = 16, 128

# What *mark* leaves at a place that is no first, greater than every id.
NO_FIRST = tl.constexpr(2**63 - 1)


@triton.jit(do_not_specialize=["places"])
def mark_kernel(item_ids, firsts, repeats, places, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """firsts `[P]`: the id at its first place, NO_FIRST elsewhere; repeats `[P]`: how many places hold it."""
    index = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = tl.load(item_ids + index, mask=index < places, other=0).to(tl.int64)  # [BP]
    earlier = tl.zeros([BLOCK_P], dtype=tl.int32)
    total = tl.zeros([BLOCK_P], dtype=tl.int32)
    for begin in range(0, places, BLOCK_J):
        index_j = begin + tl.arange(0, BLOCK_J)
        other = tl.load(item_ids + index_j, mask=index_j < places, other=0).to(tl.int64)  # [BJ]
        same = other[None, :] == own[:, None]
        total += tl.sum(same.to(tl.int32), axis=1)
        earlier += tl.sum((same & (index_j[None, :] < index[:, None])).to(tl.int32), axis=1)
    first = (own > 0) & (earlier == 0)
    tl.store(firsts + index, tl.where(first, own, NO_FIRST), mask=index < places)
    tl.store(repeats + index, total, mask=index < places)


@triton.jit(do_not_specialize=["places", "capacity"])
def place_kernel(
    item_ids,
    firsts,
    repeats,
    ids,
    slots,
    counts,
    places,
    capacity,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Slots of a block of places, what their ids' slots hold, and zeros in the block's unused slots."""
    index = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = index < places
    own = tl.load(item_ids + index, mask=mask, other=0).to(tl.int64)  # [BP]
    smaller = tl.zeros([BLOCK_P], dtype=tl.int32)
    used = tl.zeros([BLOCK_J], dtype=tl.int32)
    for begin in range(0, places, BLOCK_J):
        index_j = begin + tl.arange(0, BLOCK_J)
        first = tl.load(firsts + index_j, mask=index_j < places, other=NO_FIRST)  # [BJ]
        smaller += tl.sum((first[None, :] < own[:, None]).to(tl.int32), axis=1)
        used += (first != NO_FIRST).to(tl.int32)
    slot = tl.where(own > 0, smaller + 1, 0)
    tl.store(slots + index, tl.where(slot < capacity, slot, 0).to(tl.int64), mask=mask)
    leads = mask & (slot < capacity) & (tl.load(firsts + index, mask=mask, other=NO_FIRST) == own)
    tl.store(ids + slot, own, mask=leads)
    tl.store(counts + slot, tl.load(repeats + index, mask=mask, other=0).to(tl.int64), mask=leads)
    unused = (index < capacity) & ((index == 0) | (index > tl.sum(used, axis=0)))
    nothing = tl.zeros([BLOCK_P], dtype=tl.int64)
    tl.store(ids + index, nothing, mask=unused)
    tl.store(counts + index, nothing, mask=unused)


def forward(item_ids: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in the op's schema; see `deduplicate_reference`.

    More distinct ids than `capacity` − 1 do not raise: places of those beyond become padding.
    """
    if capacity is None:  # only the interpreter gets here: a GPU would have to be asked for the size
        return deduplicate_reference(item_ids)
    places = item_ids.numel()
    if max(places, capacity) > MOST:
        return deduplicate_without_waiting(item_ids, capacity)
    flat = item_ids.contiguous().view(-1)
    slots, firsts = torch.empty_like(flat, dtype=torch.int64), torch.empty_like(flat, dtype=torch.int64)
    repeats = torch.empty_like(flat, dtype=torch.int32)
    ids, counts = (flat.new_empty(capacity, dtype=torch.int64) for _ in range(2))
    blocks = {"BLOCK_P": _BLOCK_P, "BLOCK_J": _BLOCK_J, "num_warps": 4}
    with on_device(flat):
        if places:
            launch(mark_kernel, (cdiv(places, _BLOCK_P),), flat, firsts, repeats, places, **blocks)
        launch(
            place_kernel,
            (cdiv(max(places, capacity), _BLOCK_P),),
            flat,
            firsts,
            repeats,
            ids,
            slots,
            counts,
            places,
            capacity,
            **blocks,
        )
    return ids, slots.view(item_ids.shape), counts
