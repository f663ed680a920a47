"""Freed memory stays with the process that trains; seen in processes of their own, whose malloc is set."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from crossan_fast.training.malloc import keep_freed_memory

_FAULTS = """
import resource, sys, torch
from crossan_fast.training.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    if keep_freed_memory() < 40 << 20:
        sys.exit(3)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        [torch.ones(10 << 20) for _ in range(3)]  # 40 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(faults(5))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_step_reuses_what_the_one_before_freed() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library's malloc takes no such settings, or no such size")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("kept") < 0.1 * faults("given back")


@pytest.mark.parametrize(("limit", "kept"), [(1 << 40, 1 << 30), (32 << 20, 32 << 20), (0, 0)])
def test_an_older_glibc_is_asked_for_the_most_it_takes(
    monkeypatch: pytest.MonkeyPatch, limit: int, kept: int
) -> None:
    values: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        taken = option == -1 or value <= limit
        if taken:
            values[option] = value
        return int(taken)

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() == kept
    assert values.get(-3, 0) == kept and values[-1] == 2**31 - 1
