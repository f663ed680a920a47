"""full_loss: the rows of 64 sequences against the paper's catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import full_loss

_HOT = frozenset({"forward_kernel", "backward_rows_kernel", "backward_columns_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in {**DTYPES, **OTHER_DTYPES}.items():
        matrix = products(_HOT, dtype)
        name = "full_loss rows=640 columns=20315 d=64"
        yield Case(name, dtype, partial(call, 640, kind), _HOT, matrix, matrix)


def call(rows: int, dtype: torch.dtype) -> None:
    """A step's: the sequence encoder's users are fp32 under autocast, too."""
    users, items = new(rows, 64, kind=torch.float32), new(20_315, 64, kind=dtype)
    rest = (users, items, new(rows, kind=torch.int64))
    loss, lse = full_loss.forward(*rest)
    full_loss.backward(loss, lse, *rest)
