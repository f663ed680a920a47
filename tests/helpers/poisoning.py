"""Fresh memory that shows itself: a read of what was not written, or an output that nothing wrote."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_M_PERTURB = -6


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (integers their largest value), and fresh C++ memory −1.7e38 where glibc is."""
    perturb = getattr(ctypes.CDLL(None), "mallopt", None)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    if perturb:
        perturb(_M_PERTURB, 1)
    try:
        yield
    finally:
        if perturb:
            perturb(_M_PERTURB, 0)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
