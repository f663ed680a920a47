"""Copies of mapped files in memory, made a chunk at a time and checked on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast.cache.checked import CheckedRows

_CHUNK_BYTES = 4 << 20


def load(
    tensors: Sequence[Tensor], checked: CheckedRows, where: torch.device, pin: bool = False
) -> list[Tensor]:
    """Copies on `where` (page-locked with `pin`) of all that `checked` was made of, in its order.

    Raises:
        ValueError: NaN or inf in a row of a mapped file.
    """
    copies = []
    for number, source in enumerate(tensors):
        copy = torch.empty(source.shape, dtype=source.dtype, device=where, pin_memory=pin)
        step = max(1, _CHUNK_BYTES // max(1, source[0].numel() * source.element_size()))
        for start in range(0, len(source), step):
            chunk = source[start : start + step]
            checked.look_at(number, start, chunk)
            copy[start : start + step].copy_(chunk)
        copies.append(copy)
    checked.finish()
    return copies
