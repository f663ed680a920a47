"""Rows of host memory or a mapped file on their way to a GPU: through a ring of page-locked buffers.

A batch's rows of every modality lie one after the other in one buffer and cross the bus in one copy, while a
thread fills the next. Where the CUDA kernels are loaded, one of them converts what arrives; for rows that are
wanted as floats it reads a cache in page-locked memory itself, row by row over the bus, with nothing staged.
Rows that an op takes as they are stored, int8 or fp8 codes with scales, always go through the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crossan_fast.cache.quantize import dequantize
from crossan_fast.cache.tiers import pick_rows

_ALIGNMENT = 256  # bytes, of a source's rows in a buffer: what any kernel's vector loads want
_GROWTH = 1.25  # batches differ in size; a buffer that is too small costs a system call of milliseconds


@dataclass(frozen=True)
class Rows:
    """Rows of a cache as they are stored, by modality name.

    Attributes:
        states: `[n, L, D_m]` in the cache's dtype.
        scales: fp32 `[n, L]` for int8 and fp8 states; else None.
    """

    states: dict[str, Tensor]
    scales: dict[str, Tensor] | None = None

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from self.states.values()
        yield from (self.scales or {}).values()


class Passed(Protocol):
    """What tells that a copy is done: a `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


class Transport(Protocol):
    """Where a ring's buffers come from, and how they leave; tests put a slow one in the GPU's place."""

    def allocate(self, size: int) -> Tensor:
        """A host buffer uint8 `[size]`."""

    def send(self, buffer: Tensor) -> tuple[Tensor, Passed]:
        """The buffer's bytes on the device, and what to wait for before the buffer is written again."""


class CudaTransport:
    """Copies by the device's copy engine, on the stream that is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, buffer: Tensor) -> tuple[Tensor, Passed]:
        arrived = buffer.to(self._device, non_blocking=True)
        return arrived, torch.cuda.current_stream(self._device).record_event()


@dataclass
class _Slot:
    buffer: Tensor | None = None
    sent: Passed | None = None


class StagingRing:
    """Moves rows through `slots` buffers in turn; one thread at a time.

    A buffer is written again only after its last copy: with two, one is filled while the other is copied, and
    a third takes up differences between the two.
    """

    def __init__(self, transport: Transport, slots: int = 3) -> None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        self._transport = transport
        self._slots = [_Slot() for _ in range(slots)]
        self._next = 0

    def move(self, sources: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """`source[rows]` on the device, of each source `[R, ...]` (contiguous, on the host), in its dtype."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        sizes = [len(rows) * source[0].numel() * source.element_size() for source in sources]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        if slot.sent is not None:
            slot.sent.synchronize()
        if slot.buffer is None or slot.buffer.numel() < starts[-1]:
            slot.buffer = self._transport.allocate(int(_GROWTH * starts[-1]))
        for source, start, size in zip(sources, starts, sizes, strict=False):
            # As bytes: the CPU gathers no one-byte floats, and a row is one copy whatever its type.
            raw = source.view(torch.uint8).flatten(1)
            torch.index_select(
                raw, 0, rows, out=slot.buffer[start : start + size].view(len(rows), raw.shape[1])
            )
        arrived, slot.sent = self._transport.send(slot.buffer[: starts[-1]])
        return [
            arrived[start : start + size].view(source.dtype).view(len(rows), *source.shape[1:])
            for source, start, size in zip(sources, starts, sizes, strict=False)
        ]


# (states, scales, ids, dtype) → rows as floats on the device of ids; see `crossan_fast.ops.gather_convert`.
Kernel = Callable[[Tensor, Tensor | None, Tensor | None, torch.dtype], Tensor]
_finders: list[Callable[[torch.device], Kernel | None]] = []


def use_gather_kernel(find: Callable[[torch.device], Kernel | None]) -> None:
    """Ask `find` for the kernel of a device from now on: the ops lie above the cache and name it so."""
    _finders[:] = [find]


def gather_kernel(device: torch.device) -> Kernel | None:
    """What gathers and converts rows for `device` in one pass; None: copies and torch's own products."""
    return _finders[0](device) if _finders else None


def read_rows(
    states: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    ids: Tensor,
    target: torch.device,
    dtype: torch.dtype | None,
    ring: StagingRing | None = None,
) -> list[Tensor]:
    """Rows `ids` of each of `states` `[R, L, D]` (with fp32 `scales` `[R, L]` if quantized) on `target`.

    Args:
        dtype: of the result; None: the states', fp32 for quantized ones.
        ring: for rows that cross from the host to a GPU; None: a buffer of their own for each.
    """
    wanted = dtype or (states[0].dtype if scales is None else torch.float32)
    kernel = gather_kernel(target)
    if kernel is not None and states[0].is_pinned() and torch.float64 not in (states[0].dtype, wanted):
        on_device = ids.to(target, non_blocking=True)
        factors: Sequence[Tensor | None] = scales or [None] * len(states)
        return [
            kernel(state, factor, on_device, wanted) for state, factor in zip(states, factors, strict=True)
        ]
    picked, picked_scales = read_stored(states, scales, ids, target, ring)
    factors = picked_scales or [None] * len(states)
    return [as_floats(p, f, dtype) for p, f in zip(picked, factors, strict=True)]


def read_stored(
    states: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    ids: Tensor,
    target: torch.device,
    ring: StagingRing | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """As `read_rows`, as they are stored: rows of `states`, and of `scales` where there are some."""
    rows = ids.to(states[0].device)
    sources = [*states, *(scales or ())]
    if ring is not None:
        picked = ring.move(sources, rows)
    else:
        picked = [pick_rows(source, rows, target) for source in sources]
    return picked[: len(states)], None if scales is None else picked[len(states) :]


def as_floats(picked: Tensor, scales: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Picked rows in `dtype` (default: theirs, fp32 for quantized ones), on the device they are on."""
    if scales is None:
        return picked if dtype is None else picked.to(dtype)
    wanted = dtype or torch.float32
    kernel = gather_kernel(picked.device)
    if kernel is not None and wanted != torch.float64:
        return kernel(picked, scales, None, wanted)  # one pass instead of three
    return dequantize(picked, scales, wanted)
