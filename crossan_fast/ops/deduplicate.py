"""deduplicate: the distinct ids of a batch, their counts, and where each place finds its id.

An item's embedding depends on its id alone, so the side network, fusion and loss run once per distinct id.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from crossan_fast._checks import check_integer, check_range, check_tensor, describe
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define, on_one_device


class Deduplicated(NamedTuple):
    """Attributes:
    ids: int64 `[U]`: slot 0 holds padding (id 0), then the distinct ids in ascending order; with a
        `capacity`, unused slots at the end hold id 0 again.
    slots: int64, the shape of the input: the slot of each place; 0 exactly at padding.
    counts: int64 `[U]`: how many places hold the slot's id; 0 for padding and unused slots.
    """

    ids: Tensor
    slots: Tensor
    counts: Tensor


def deduplicate_reference(item_ids: Tensor, capacity: int | None = None) -> Deduplicated:
    """The definition, in plain torch.

    Args:
        item_ids: int64 or int32 of any shape, 0 at padding.
        capacity: the number of slots to pad to; None: as many as there are.

    Raises:
        ValueError: more distinct ids than `capacity` − 1.
    """
    flat = item_ids.reshape(-1).to(torch.int64)
    padded = torch.cat([flat.new_zeros(1), flat])
    ids, inverse, counts = torch.unique(padded, sorted=True, return_inverse=True, return_counts=True)
    counts[0] = 0
    if capacity is not None:
        _check_fits(ids.numel(), capacity)
        ids = pad(ids, (0, capacity - ids.numel()))
        counts = pad(counts, (0, capacity - counts.numel()))
    return Deduplicated(ids, inverse[1:].reshape(item_ids.shape), counts)


def _check_fits(needed: int, capacity: int) -> None:
    if needed > capacity:
        raise ValueError(f"capacity: {needed} slots needed (padding included), got {capacity}")


def first_places(slots: Tensor, count: int) -> Tensor:
    """For each of `count` slots the first place that has it, `[count]`; 0 for slots that no place has."""
    flat = slots.reshape(-1)
    places = torch.arange(flat.numel(), device=flat.device)
    first = flat.new_full((count,), flat.numel()).scatter_reduce(0, flat, places, "amin")
    return torch.where(first == flat.numel(), 0, first)


def deduplicate_without_waiting(item_ids: Tensor, capacity: int) -> Deduplicated:
    """The same of fixed shapes, in plain torch that asks the device for nothing: what `eager` runs on a GPU.

    More distinct ids than `capacity` − 1 cannot raise here; places of those beyond become padding.
    """
    flat = item_ids.reshape(-1).to(torch.int64)
    ordered, order = torch.sort(pad(flat, (1, 0)))
    # One slot more than there are takes the writes of ids that do not fit.
    slot = pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0)).clamp_max(capacity)
    ids = flat.new_zeros(capacity + 1).scatter_(0, slot, ordered)
    counts = flat.new_zeros(capacity + 1).scatter_(0, slot, 1, reduce="add")
    counts[0].zero_()
    slots = torch.empty_like(slot).scatter_(0, order, slot % capacity)  # `order` names every place
    return Deduplicated(ids[:capacity], slots[1:].reshape(item_ids.shape), counts[:capacity])


@on_one_device
def deduplicate(item_ids: Tensor, capacity: int | None = None, *, backend: str = "auto") -> Deduplicated:
    """The distinct ids of a batch; arguments as `deduplicate_reference`.

    With a `capacity` the result's shape is known, and no backend on a GPU waits for the device; more distinct
    ids than fit are then an error only where the ids are on the CPU. A capacity of `item_ids.numel() + 1`
    always fits. Without one the reference runs on a GPU and where `torch.compile` traces, whatever the
    backend.

    Raises:
        TypeError, ValueError: arguments that do not fit, named; on the CPU also negative ids.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    if not isinstance(item_ids, Tensor) or item_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"item_ids: expected a tensor of int64 or int32, got {describe(item_ids)}")
    check_tensor("item_ids", item_ids, item_ids.shape)
    check_range("item_ids", item_ids, 0)
    if capacity is None and item_ids.is_meta:
        raise ValueError(f"item_ids: expected ids with values, or a capacity, got {describe(item_ids)}")
    if capacity is not None:
        check_integer("capacity", capacity, 1, 2**31 - 1)
    on_cpu = item_ids.device.type == "cpu"
    choice = choose("deduplicate", item_ids.device.type, torch.int64, (), backend)
    if choice.backend == "eager":
        if capacity is None or on_cpu:
            return deduplicate_reference(item_ids, capacity)
        return deduplicate_without_waiting(item_ids, capacity)
    # A GPU has to be asked for the size, which saves nothing there; a traced op has to know it.
    if capacity is None and (not on_cpu or torch.compiler.is_compiling()):
        return deduplicate_reference(item_ids)
    # The kernel, which on the CPU runs in the interpreter, cannot raise.
    if on_cpu and capacity is not None and choice.backend == "triton" and not torch.compiler.is_compiling():
        _check_fits(torch.unique(pad(item_ids.reshape(-1), (1, 0))).numel(), capacity)
    return Deduplicated(*_deduplicate(item_ids, capacity, choice.backend))


def _fake(item_ids, capacity):
    if capacity is None:
        size = torch.library.get_ctx().new_dynamic_size()
    else:
        size = capacity
    ids = item_ids.new_empty((size,), dtype=torch.int64)
    return ids, item_ids.new_empty(item_ids.shape, dtype=torch.int64), torch.empty_like(ids)


_deduplicate = define("deduplicate(Tensor item_ids, int? capacity) -> (Tensor, Tensor, Tensor)", _fake)
