"""Shared fixtures: every test starts from one seed, on one thread or on CROSSAN_FAST_TEST_THREADS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import poisoning
import pytest
import torch

# Before anything imports triton: whether its own functions run in the interpreter is settled at their import.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`sweep(keep)`: the default run holds `keep` cases spread over a test's own, `.ci/long` the others.

    Where there is a GPU, emulated kernels are real ones, and the default run holds all.
    """
    if torch.cuda.is_available():
        return
    sweeps: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sweep") and not item.get_closest_marker("long"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sweeps.values():
        (keep,) = cases[0].get_closest_marker("sweep").args
        kept = {place * len(cases) // keep for place in range(keep)}
        for place, item in enumerate(cases):
            if place not in kept:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(int(os.environ.get("CROSSAN_FAST_TEST_THREADS", "1")))


@pytest.fixture
def matmul_switch() -> Iterator[Any]:
    """torch.backends.cuda.matmul, whose `fp32_precision` is put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    with poisoning.poisoned_memory():
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, from CROSSAN_FAST_DATA or beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CROSSAN_FAST_DATA", beside))
    if not (folder / "scientific" / "users.tsv").is_file():
        pytest.skip(f"real data not found in {folder}; set CROSSAN_FAST_DATA to its folder")
    return folder
