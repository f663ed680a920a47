"""Kernels run in Triton's interpreter here, on memory that is poisoned before use."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device():
    """Where kernels run: a GPU, or the CPU by interpreter (see tests/conftest.py)."""
    return torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN (the largest value in integers), so that an element nobody wrote shows."""

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, **k: poison(_f(*a, **k)))
    for name in ("new_empty", "new_empty_strided"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _f=original, **k: poison(_f(*a, **k)))


@pytest.fixture
def judge():
    """Error at most twice eager's in the same dtype, both measured from float64.

    Half a unit in the last place of the largest entry comes on top: what rounding the exact result costs.
    """

    def check(name, actual, eager, truth):
        assert truth.dtype == torch.float64
        assert actual.shape == truth.shape, name
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        if truth.numel() == 0:
            return
        unit = torch.finfo(actual.dtype).eps / 2 * truth.abs().max()
        error, allowed = (actual.double() - truth).norm(), 2 * (eager.double() - truth).norm() + unit
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

    return check
