"""Programs that an attack starts: Python in a process of its own, with the shim where calls are to fail."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tally import Tally

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Threads that wait for each other do not spin: many more of them than cores are started.
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run_python(
    *words: str, progress: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "TRITON_INTERPRET": "1", **QUIET, **environment}
    if progress is not None:
        settings["ATTACK_PROGRESS"] = str(progress)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=settings, capture_output=True, text=True)


def compile_shim(folder: Path) -> Path:
    """The preloaded library of `faults`; CalledProcessError where there is no C compiler."""
    shim = folder / "shim.so"
    command = [
        os.environ.get("CC", "cc"),
        "-O1",
        "-shared",
        "-fPIC",
        "-o",
        str(shim),
        str(HERE / "shim.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return shim


def _formats() -> list[str]:
    import hostile_files

    return list(hostile_files.FORMATS)


def faulty(command: str, kind: str, most: int = 1000) -> Tally:
    """Every call of a command failing in turn, up to `most`."""
    with tempfile.TemporaryDirectory() as folder:
        shim = compile_shim(Path(folder))
        words = ("tests/attack/faults.py", command, kind, f"{folder}/work", str(most))
        done = run_python(*words, LD_PRELOAD=str(shim))
    if done.returncode:
        tally = Tally(f"a failing call ({kind}) in {command}")
        tally.add("crashed", done.stderr[-400:])
        return tally
    return Tally.from_json(done.stdout.splitlines()[-1])
