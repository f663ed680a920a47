"""Peak memory that a call adds to what was there before it.

On a GPU: what torch's allocator held at most. On a CPU: how far the process' resident memory rose, which
counts every allocation, whoever made it. glibc keeps freed blocks, which would hide the next call's; during a
measurement every block of 64 KiB or more is therefore a mapping of its own, given back when freed, and the
free blocks that the process had before are taken first, so that none of them serves the call. Resident memory
is counted in pages and, per thread, in batches: expect ± 1 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


class _Mallinfo2(ctypes.Structure):
    """What glibc's malloc.h calls `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_MAPPED = 64 << 10  # bytes from which a block is a mapping of its own during a measurement
_SETTLED = 32 << 20  # where glibc's own moving threshold comes to rest in a process with large tensors


def peak_added(call: Callable[[], object], device: torch.device, times: int = 3) -> int | None:
    """Bytes at the highest point of `call` over those before it; None where this system can't tell.

    The result of `call` counts if it is returned; what it returns is dropped. It should have run before. On a
    CPU the least of `times` calls counts.
    """
    if device.type == "cuda":
        return _cuda(call, device)
    libc = _libc()
    if libc is None or not _CLEAR.exists():
        return None
    with _every_block_mapped(libc):
        if times > 1:
            call()
        return min(_resident_rise(libc, call) for _ in range(times))


def settle() -> None:
    """Fix glibc's thresholds where they come to rest anyway, so that timings before and after agree."""
    if libc := _libc():
        libc.mallopt(_MMAP_THRESHOLD, _SETTLED)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _SETTLED)


def _cuda(call: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _resident_rise(libc: ctypes.CDLL, call: Callable[[], object]) -> int:
    gc.collect()
    libc.malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


@contextlib.contextmanager
def _every_block_mapped(libc: ctypes.CDLL) -> Iterator[None]:
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
    libc.mallopt(_TRIM_THRESHOLD, _MAPPED)
    taken = _take_free_blocks(libc)
    try:
        yield
    finally:
        for block in taken:
            libc.free(block)
        settle()


def _take_free_blocks(libc: ctypes.CDLL) -> list[int]:
    """Allocate, untouched, the heap's free blocks from `_MAPPED` bytes, which malloc would serve first."""
    taken: list[int] = []
    size = 1 << (libc.mallinfo2().fordblks | _MAPPED).bit_length()
    while size >= _MAPPED:
        mappings = libc.mallinfo2().hblks
        block = libc.malloc(size)
        if libc.mallinfo2().hblks == mappings and block:
            taken.append(block)
        else:  # a new mapping: no free block is that large
            libc.free(block)
            size //= 2
    return taken


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt, libc.malloc_trim  # noqa: B018 - other C libraries lack them
        libc.mallinfo2.restype = _Mallinfo2
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    except (OSError, AttributeError):
        return None
    return libc
