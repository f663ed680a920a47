"""The allocator of a process that trains on a CPU: what a step frees, the next one gets."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_MOST_KEPT = (1 << 31) - 1
# Before 2.35 glibc refuses a threshold over 32 MB, half of a thread's heap.
_LARGEST_BLOCKS = 1 << 30, 32 << 20


def keep_freed_memory() -> int:
    """Have glibc keep freed blocks for this process, and return up to how many bytes a block may have.

    1 GB; 32 MB before glibc 2.35; 0 with another C library, where nothing changes. By itself glibc gives
    blocks over 32 MB, and free memory at the end of its heap, back to the system at once. A step over a whole
    catalogue has a few of them, so every step began with thousands of page faults. For a process that is
    there to train: it holds the memory of its largest step to its end.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return 0
    mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
    return next((size for size in _LARGEST_BLOCKS if mallopt(_MMAP_THRESHOLD, size)), 0)
