"""topk_scores: 12,076 users, 20,314 items, histories of 10."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import topk_scores

_HOT = frozenset({"topk_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in {**DTYPES, **OTHER_DTYPES}.items():
        for k in (10, 100, 200) if dtype in DTYPES else (10,):
            run = partial(call, k, kind)
            yield Case(f"topk_scores k={k} d=64", dtype, run, _HOT, products(_HOT, dtype))


def call(k: int, dtype: torch.dtype) -> None:
    """One ranking."""
    users, items = new(12_076, 64, kind=dtype), new(20_315, 64, kind=dtype)
    topk_scores.forward(users, items, k, new(12_076, 10, kind=torch.int64))
