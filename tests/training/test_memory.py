"""Freed memory stays with the process that trains; seen in processes of their own, whose malloc is set."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from crossan_fast.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    if not keep_freed_memory():
        sys.exit(3)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        [torch.ones(10 << 20) for _ in range(3)]  # 40 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(faults(5))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_step_reuses_what_the_one_before_freed() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library's malloc takes no such settings")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("kept") < 0.1 * faults("given back")
