"""Where kernels are compiled and not interpreted, their tests are a GPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.long
@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_gpus_tests_are_the_kernels_where_they_run_on_it(interpreted: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *map(str, (HERE / "test_fusion.py", HERE / "test_aot.py"))],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ("test_fusion.py" in done.stdout) != interpreted, done.stdout + done.stderr
    assert "test_aot.py::" not in done.stdout
