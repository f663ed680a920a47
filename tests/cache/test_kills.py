"""A kill at any moment leaves the old cache or the new one, and the command then ends as if never killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kill_points
import pytest

OFTEN = {"change"}  # it holds a kill at every kind of call


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.long)
        for name in sorted(kill_points.COMMANDS)
    ],
)
def test_a_kill_at_any_call_that_changes_files(tmp_path: Path, command: str) -> None:
    program = [sys.executable, kill_points.__file__, command, str(tmp_path)]
    done = subprocess.run(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # places that it was killed at
