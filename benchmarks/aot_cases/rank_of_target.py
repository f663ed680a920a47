"""rank_of_target: 12,076 users, 20,314 items, histories of 10."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import rank_of_target

_HOT = frozenset({"rank_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in {**DTYPES, **OTHER_DTYPES}.items():
        matrix = products(_HOT, dtype)
        yield Case("rank_of_target d=64", dtype, partial(call, kind), _HOT, matrix, matrix, dtype == "tf32")


def call(dtype: torch.dtype) -> None:
    """One ranking."""
    users, items = new(12_076, 64, kind=dtype), new(20_315, 64, kind=dtype)
    rank_of_target.forward(users, items, new(12_076, kind=torch.int64), new(12_076, 10, kind=torch.int64))
