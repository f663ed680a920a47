"""The allocator of a process that trains on a CPU: what a step frees, the next one gets."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_LARGEST_MAPPED, _MOST_KEPT = 1 << 30, (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 1 GB for this process; False with another C library.

    By itself it gives blocks over 32 MB back to the system as soon as they are freed. A step over a whole
    catalogue has a few of them, so every step began with thousands of page faults. For a process that is
    there to train: it holds the memory of its largest step to its end.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MAPPED)) and bool(mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
