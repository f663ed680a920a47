"""Batches with what can be known before their step: rows read ahead, pages touched, slots counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crossan_fast import ops
from crossan_fast._sources import ReadAhead
from crossan_fast.cache import HiddenStateCache
from crossan_fast.training.batches import Batches


def feed(
    batches: Batches,
    number: int,
    cache: HiddenStateCache,
    device: torch.device,
    *,
    slots: bool = True,
    gather: bool = True,
    backend: str = "auto",
) -> Iterator[tuple[Tensor, ReadAhead]]:
    """An epoch's `(item_ids on device, what was read ahead)`, by where the cache's states are.

    Resident on a GPU: the op reads rows by id; batches come with their number of slots in buckets
    (`slots`: off where shapes have to agree between processes). Pinned or memory-mapped for a GPU: the next
    batches' distinct rows are gathered in the background (`gather`: off where a step reads others, too);
    `batches` must then be on the CPU, since the host reads the rows. On the CPU: the next batch's pages are
    read from disk meanwhile. Memory-mapped files that fit the free memory are read whole in the background,
    too. `backend` is that of `ops.deduplicate` on the host.
    """
    if cache.tier == "mmap":
        cache.warm()
    if device.type == "cpu":
        for item_ids in _touched(batches.epoch(number), cache):
            yield item_ids, ReadAhead()
    elif cache.tier == "resident":
        counts = batches.distinct(number) if slots else [None] * len(batches)
        for item_ids, count in zip(batches.epoch(number), counts, strict=True):
            capacity = None if count is None else bucket(count, item_ids.numel() + 1)
            yield item_ids, ReadAhead(capacity=capacity)
    elif not gather:
        for item_ids in batches.epoch(number):
            yield item_ids.to(device, non_blocking=True), ReadAhead()
    else:
        yield from _gathered(batches.epoch(number), cache, device, backend)


def bucket(count: int, most: int) -> int:
    """`count` rounded up by at most an eighth (64 at least), so that an epoch has few sizes of batch."""
    step = max(64, 1 << max(count.bit_length() - 4, 0))
    return min(-(-count // step) * step, most)


def _touched(batches: Iterator[Tensor], cache: HiddenStateCache) -> Iterator[Tensor]:
    """Each batch while the pages of the one after it are being read; no work on tiers without pages."""
    waiting = None
    for item_ids in batches:
        if cache.tier == "mmap":
            cache.touch(item_ids.flatten())
        if waiting is not None:
            yield waiting
        waiting = item_ids
    if waiting is not None:
        yield waiting


def _gathered(
    batches: Iterator[Tensor], cache: HiddenStateCache, device: torch.device, backend: str
) -> Iterator[tuple[Tensor, ReadAhead]]:
    drawn: list[Tensor] = []

    def distinct() -> Iterator[Tensor]:
        for item_ids in batches:
            drawn.append(item_ids)
            yield ops.deduplicate(item_ids, backend=backend).ids

    for _, rows in cache.prefetch_stored(distinct(), device):
        yield drawn.pop(0).to(device, non_blocking=True), ReadAhead(gathered=rows)
