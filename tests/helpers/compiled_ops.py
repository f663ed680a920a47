"""What the tests of the compiled CPU ops share: where they run, the bare ops, random numbers, comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crossan_fast import _build

needs_cpp = pytest.mark.skipif(
    _build.PARTS["cpu"].missing() is not None, reason=f"cannot build: {_build.PARTS['cpu'].missing()}"
)


def library() -> Any:
    """The compiled ops without the checks and the dispatch in front of them."""
    _build.load("cpu")
    return torch.ops.crossan_fast_cpp


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got, expected, rtol=1e-10, atol=1e-12):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def assert_same_bits_on_any_threads(run) -> None:
    """`run()` gives the same bits on one, two and three threads, and twice on two."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))
