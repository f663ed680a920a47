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
