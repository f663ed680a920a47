"""batch_rows: a batch of 64 users."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, Case, new
from crossan_fast.kernels import batch_rows

_HOT = frozenset({"forward_kernel", "backward_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        for width in (64, 256):
            yield Case(f"batch_rows d={width}", dtype, partial(call, width, kind), _HOT, short=width == 64)


def call(width: int, kind: torch.dtype) -> None:
    """Both passes of a step, in which nothing reads the rows by place."""
    slots, ids = new(64, 11, kind=torch.int64), new(705, kind=torch.int64)
    columns, histories, *_ = batch_rows.forward(
        new(705, width, kind=kind), slots, ids, new(20_315, kind=torch.float32)
    )
    batch_rows.backward(columns, histories, None, slots, *columns.shape, kind)
