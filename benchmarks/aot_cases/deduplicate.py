"""deduplicate: a batch of 64 users."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import Case, new
from crossan_fast.kernels import deduplicate

_HOT = frozenset({"mark_kernel", "place_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for kind in (torch.int64, torch.int32):
        name = str(kind).removeprefix("torch.")
        yield Case("deduplicate", name, partial(call, kind), _HOT, short=kind == torch.int64)


def call(kind: torch.dtype) -> None:
    """One batch."""
    deduplicate.forward(new(64, 11, kind=kind), 705)
