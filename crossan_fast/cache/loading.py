"""Copies of mapped files in memory, made a chunk at a time and checked on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast.cache.checked import CheckedRows, rows_at_once


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
        for start in range(0, len(source), step := rows_at_once(source)):
            chunk = source[start : start + step]
            checked.look_at(number, start, chunk)
            copy[start : start + step].copy_(chunk)
        copies.append(copy)
    checked.finish()
    return copies
