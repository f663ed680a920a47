"""sequence_encoder: the paper's size, and the longest and widest that is served."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, Case, new, products
from crossan_fast.kernels import sequence_encoder

_HOT = frozenset({"forward_kernel", "backward_kernel", "sums_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        widest = 128 if dtype == "bf16" else 64
        for places, width, hot in ((10, 64, _HOT), (16, 64, _HOT), (64, widest, frozenset[str]())):
            run = partial(call, 64, places, width, kind)
            # Of few places the sums' tiles have 32 rows.
            matrix = products(_HOT, dtype)
            wide = products(_HOT & {"sums_kernel"}, dtype) if places > 16 else frozenset[str]()
            short = places == 10 and dtype == "bf16"
            yield Case(f"sequence_encoder B=64 S={places} d={width}", dtype, run, hot, matrix, wide, short)


def call(users: int, places: int, width: int, dtype: torch.dtype) -> None:
    """Two blocks of two heads with dropout; items and weights of one type."""
    inner = 4 * width

    def own(*shape: int) -> torch.Tensor:
        return new(*shape, kind=dtype)

    block = (
        [(width, width)] * 4 + [(width,)] * 2 + [(inner, width), (inner,), (width, inner)] + [(width,)] * 3
    )
    weights = [own(*shape) for shape in [(places, width), (width,), (width,), *block, *block]]
    items, mask = own(users, places, width), new(users, places, kind=torch.bool)
    common = (items, mask, weights, 2, 1e-6, 0.1, new(kind=torch.int64))
    grad, kept = sequence_encoder.forward(*common, True, dtype)
    sequence_encoder.backward(grad, kept, *common, dtype)
