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
def _poisoned(poisoned_memory):
    pass
