"""in_batch_loss: 64 and 1,024 sequences of the paper's length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import in_batch_loss

_HOT = frozenset({"forward_kernel", "backward_rows_kernel", "backward_columns_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        matrix = products(_HOT, dtype)
        for sequences, columns in ((64, 704), (1_024, 11_264)):
            name = f"in_batch_loss rows={sequences * 10} columns={columns} d=64"
            yield Case(name, dtype, partial(call, sequences, columns, kind), _HOT, matrix, matrix)
    for dtype, kind in OTHER_DTYPES.items():
        matrix = products(_HOT, dtype)
        name = "in_batch_loss rows=640 columns=704 d=64"
        yield Case(name, dtype, partial(call, 64, 704, kind), _HOT, matrix, matrix)


def call(sequences: int, columns: int, dtype: torch.dtype) -> None:
    """A step's: the sequence encoder's users are fp32 under autocast, too."""
    users, items = new(sequences, 10, 64, kind=torch.float32), new(columns, 64, kind=dtype)
    slots, counts = new(sequences, 11, kind=torch.int64), new(columns, kind=torch.int64)
    rest = (users, items, slots, counts, new(columns, kind=torch.float32))
    loss, lse = in_batch_loss.forward(*rest)
    in_batch_loss.backward(loss, lse, *rest)
