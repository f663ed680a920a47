"""Kernels compile for GPUs that are not here: no spills, shared memory within limits, matrix instructions.

Really compiled, in a process of their own (this one's kernels are the interpreter's) and with a cache of
their own: the hot kernels of the paper's size for sm_90 at 704 items. `python -m benchmarks.aot` makes the
full table (both architectures, 20,314 items, fp8 caches, D = 1,024 and 4,096, fp32, the other ops), and its
rows are what the figures here are compared with. Where another Triton wrote them, limits alone are checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_hot_kernels_compile_within_their_limits(tmp_path):
    case = "side_network n=704 D=768 r=64 bf16"
    done = run(tmp_path, "-m", "benchmarks.aot", "--check", "--hot", "--arch", "90", "--only", case)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_90")]
    for kernel in ("down_kernel", "walk_kernel", "up_gradient_kernel", "down_gradient_kernel"):
        assert any(kernel in line for line in lines), f"{kernel} was not compiled"


def test_a_figure_that_changed_is_reported():
    """The comparison itself: each figure alone, other versions, and what the table lacks."""
    from benchmarks import aot

    row = aot.Row("sm_90", "3.9.0", "case", "bf16", "k", 4, 100, 0, 1024, 8, 0, 0, 0, 0, 0)
    table = [{key: str(value) for key, value in vars(row).items()}]
    assert aot.differences([row], table) == []
    for name, value, reported in (
        ("registers", 108, False),
        ("registers", 109, True),
        ("shared_bytes", 1040, True),
        ("hgmma", 7, True),
        ("kernel", "other", True),
        ("triton", "3.6.0", False),
    ):
        changed = aot.Row(**{**vars(row), name: value})
        assert bool(aot.differences([changed], table)) == reported, name
