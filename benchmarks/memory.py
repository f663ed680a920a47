"""Peak memory that a call adds to what was there before it.

On a GPU: what torch's allocator held at most. On a CPU: how far the process' resident memory rose, which
counts every allocation, whoever made it. glibc keeps freed blocks, which would hide the next call's; during a
measurement every block of 64 KiB or more is therefore a mapping of its own, given back when freed. Resident
memory is counted in pages and, per thread, in batches: expect ± 1 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_SETTLED = 32 << 20  # where glibc's own moving threshold comes to rest in a process with large tensors


def peak_added(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of `call` over those before it; None where this system can't tell.

    The result of `call` counts if it is returned; what it returns is dropped. It should have run before.
    """
    if device.type == "cuda":
        return _cuda(call, device)
    libc = _libc()
    if libc is None or not _CLEAR.exists():
        return None
    with _every_block_mapped(libc):
        call()
        return min(_resident_rise(libc, call) for _ in range(3))


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
    libc.mallopt(_MMAP_THRESHOLD, 64 << 10)
    libc.mallopt(_TRIM_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        settle()


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt, libc.malloc_trim  # noqa: B018 - other C libraries lack them
    except (OSError, AttributeError):
        return None
    return libc
