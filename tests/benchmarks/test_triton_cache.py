"""A cache of kernels for a GPU that is elsewhere: filled without one, found again from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cache(*arguments: str, returns: int = 0) -> str:
    """What the command prints."""
    return compiling("-m", "benchmarks.triton_cache", *arguments, returns=returns)


def compiling(*arguments: str, returns: int = 0) -> str:
    """What Python prints in a process whose kernels are not the interpreter's."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == returns, done.stdout + done.stderr
    return done.stdout


ONE = """
import triton
from benchmarks import registry, triton_cache
triton.knobs.compilation.store_binary_only = True
counted = triton_cache.count()
(case,) = registry.select("full_loss/rows=640", device="cuda")
triton_cache.compile_case(case, "bf16", 90, only=frozenset({"forward_kernel"}))
print(counted.compiled, counted.found)
"""


@pytest.mark.long
def test_nothing_is_compiled_twice_where_the_folder_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, moved = tmp_path / "here", tmp_path / "there"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(first))
    assert compiling("-c", ONE).split() == ["1", "0"]
    cache("fill", str(first), "--only", "no such case", returns=1)  # writes whose kernels they are
    first.rename(moved)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(moved))
    assert "of this very Triton" in cache("use", str(moved))
    assert compiling("-c", ONE).split() == ["0", "1"]
    kept = {path.suffix for path in moved.glob("*/forward_kernel.*")}
    assert {".cubin", ".json"} <= kept <= {".cubin", ".json", ".source"}, "what a launch reads, and no more"


STEP = """
from benchmarks import registry, triton_cache
(case,) = registry.select("step/B=64,M=2,D=384,loss=in_batch", device="cuda")
print(sorted(triton_cache.compile_case(case, "bf16", 90, only=frozenset())))
"""


@pytest.mark.long
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
