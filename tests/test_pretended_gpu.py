"""Runs tests/pretended_gpu, each file in a process where torch has a CUDA and Triton interprets nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "pretended_gpu"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what it does is tested on it")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path.name, marks=() if path.name == "test_fake_step.py" else pytest.mark.long)
        for path in sorted(FOLDER.glob("test_*.py"))
    ],
)
def test_file(file: str, tmp_path: Path) -> None:
    changes = {"CROSSAN_FAST_PRETENDED_GPU": "1", "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(FOLDER / file)]
    done = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
