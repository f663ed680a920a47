"""A cache of kernels for a GPU that is elsewhere: filled without one, found again from another folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cache(*arguments: str) -> str:
    """What the command prints."""
    return compiling("-m", "benchmarks.triton_cache", *arguments)


def compiling(*arguments: str) -> str:
    """What Python prints in a process whose kernels are not the interpreter's."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counts(printed: str) -> tuple[int, int]:
    compiled, found = re.findall(r"compiled (\d+) kernels and found (\d+)", printed)[-1]
    return int(compiled), int(found)


@pytest.mark.slow
def test_nothing_is_compiled_twice_where_the_folder_was_moved(tmp_path: Path) -> None:
    first, moved = tmp_path / "here", tmp_path / "there"
    case = ("--only", "full_loss/rows=640")
    compiled, _ = counts(cache("fill", str(first), *case))
    assert compiled >= 3
    first.rename(moved)
    assert "of this very Triton" in cache("use", str(moved))
    assert counts(cache("fill", str(moved), *case)) == (0, compiled)
    names = {path.suffix for path in moved.glob("*/*kernel*")}
    assert names == {".cubin", ".json"}, "what a launch reads, and no more"
    for listing in moved.glob("*/__grp__*.json"):
        assert all(Path(path).parent == listing.parent for path in json.loads(listing.read_text()).values())


STEP = """
from benchmarks import registry, triton_cache
(case,) = registry.select("step/B=64,M=2,D=384,loss=in_batch", device="cuda")
print(sorted(triton_cache.compile_case(case, "bf16", 90, only=frozenset())))
"""


def test_a_step_reaches_the_host_functions_of_both_passes_without_a_gpu() -> None:
    """Under autocast, with the weights, ids and caches of training; nothing is compiled here."""
    called = eval(compiling("-c", STEP).splitlines()[-1])
    for op in ("side_network", "fusion", "in_batch_loss"):
        assert {(op, "forward"), (op, "backward")} <= set(called)


def test_every_pattern_names_cases() -> None:
    from benchmarks import registry, triton_cache

    assert not [pattern for pattern in triton_cache.PATTERNS if not registry.select(pattern, device="cuda")]


def test_a_cache_of_another_triton_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import triton_cache

    assert triton_cache.main(["use", str(tmp_path)]) == 2
    made = {"triton": "3.6.0", "python": "cpython-312", "ptxas": "a", "files": "b"}
    (tmp_path / triton_cache.MADE).write_text(json.dumps(made))
    monkeypatch.setattr(triton_cache, "_identity", lambda: {**made, "python": "cpython-311"})
    assert triton_cache.main(["use", str(tmp_path)]) == 1
    assert "another python (here cpython-311, there cpython-312)" in capsys.readouterr().out
