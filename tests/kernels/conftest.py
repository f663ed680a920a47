"""Kernels run in Triton's interpreter here, or on a GPU where there is one; memory is poisoned before use.

On a GPU they are marked as its tests, so that `pytest -m gpu` runs them: all but those that run in
processes of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

_ELSEWHERE = ("test_aot.py", "test_specialisations.py", "test_marks.py")


def pytest_collection_modifyitems(items):
    if os.environ["TRITON_INTERPRET"] != "1":
        for item in items:
            if Path(__file__).parent in item.path.parents and item.path.name not in _ELSEWHERE:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """Where kernels run: a GPU, or the CPU by interpreter (see tests/conftest.py)."""
    return torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    pass
