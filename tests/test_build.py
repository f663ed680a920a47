"""The build on first use: what it keys on, what it says, and what happens where it can't."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crossan_fast import _build

SOURCE = """
#include <torch/library.h>
TORCH_LIBRARY(crossan_fast_probe, library) { library.def("answer() -> int", [] { return int64_t(42); }); }
"""
NO_COMPILER = _build.PARTS["cpu"].missing()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=f"cannot build: {NO_COMPILER}")


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A part of one small file, built below the test's own folder."""
    csrc = tmp_path / "csrc"
    (csrc / "probe").mkdir(parents=True)
    (csrc / "probe" / "probe.cpp").write_text(SOURCE)
    (csrc / "shared.h").write_text("#pragma once\n")
    monkeypatch.setattr(_build, "CSRC", csrc)
    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path / "built"))
    part = _build.Part("probe", ("probe",), lambda: ["-O0"], missing=_build.PARTS["cpu"].missing)
    monkeypatch.setitem(_build.PARTS, "probe", part)
    _build._outcome.cache_clear()
    yield part
    _build._outcome.cache_clear()


def test_key_changes_with_everything_the_library_depends_on(probe, monkeypatch):
    keys = [_build.build_key(probe)]
    assert _build.build_key(probe) == keys[0]
    (_build.CSRC / "probe" / "probe.cpp").write_text(SOURCE + "// changed\n")
    keys.append(_build.build_key(probe))
    (_build.CSRC / "shared.h").write_text("#pragma once\n// changed\n")
    keys.append(_build.build_key(probe))
    keys.append(_build.build_key(replace(probe, cxx_flags=lambda: ["-O1"])))
    monkeypatch.setattr(_build, "cpu_flags", lambda: ["other"])
    keys.append(_build.build_key(probe))
    monkeypatch.setattr(_build.torch, "__version__", "0.0")
    keys.append(_build.build_key(probe))
    monkeypatch.setattr(_build, "compiler_version", lambda: "another compiler")
    keys.append(_build.build_key(probe))
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_builds_once_says_so_and_clears_a_stale_lock(probe, caplog):
    folder = _build.build_folder(probe)
    folder.mkdir(parents=True)
    (folder / "work-1").mkdir()
    (folder / "work-1" / "lock").touch()  # left by an interrupted build; torch would wait for it for ever
    assert _build.built("probe") is None
    info = _build.load("probe")
    said = caplog.text
    assert f"removing {folder / 'work-1'}" in said
    assert "building the probe kernels, once: 1 files with " in said and f" s; kept in {folder}" in said
    assert "built the probe kernels in " in said
    caplog.clear()
    assert _build.torch.ops.crossan_fast_probe.answer() == 42
    assert Path(info.library).parent == folder and info.seconds > 0
    assert _build.built("probe") == info
    assert sorted(path.name for path in folder.iterdir()) == [
        "builder",
        "crossan_fast_probe.so",
        "stamp.json",
    ]
    _build._outcome.cache_clear()
    assert _build.load("probe") == info
    assert not caplog.records


@pytest.mark.long
@needs_compiler
def test_folders_of_ops_may_hold_files_of_one_name(probe):
    include = '#include <torch/library.h>\n#include "value.h"\n'
    for op, value in (("first", 1), ("second", 2)):
        folder = _build.CSRC / "probe" / op
        folder.mkdir()
        (folder / "value.h").write_text(f"#pragma once\nconstexpr int64_t kValue = {value};\n")
        (folder / "op.cpp").write_text(
            f"{include}TORCH_LIBRARY_FRAGMENT(crossan_fast_folders, library) "
            f'{{ library.def("{op}() -> int", [] {{ return kValue; }}); }}\n'
        )
    (_build.CSRC / "probe" / "probe.cpp").unlink()
    key = _build.build_key(probe)
    _build.load("probe")
    ops = _build.torch.ops.crossan_fast_folders
    assert (ops.first(), ops.second()) == (1, 2)
    (_build.CSRC / "probe" / "second" / "value.h").write_text("#pragma once\nconstexpr int64_t kValue = 3;\n")
    assert _build.build_key(probe) != key


@needs_compiler
def test_a_library_of_the_wheel_is_loaded_without_a_build(probe, tmp_path):
    (_build.CSRC / "probe" / "probe.cpp").write_text(
        SOURCE.replace("crossan_fast_probe", "crossan_fast_wheel")
    )
    folder = tmp_path / "libraries" / "probe"
    made = _build.compile_into("probe", folder)
    assert made.ahead_of_time and made.library == str(folder / "crossan_fast_probe.so")
    assert sorted(path.name for path in folder.iterdir()) == ["crossan_fast_probe.so", "stamp.json"]
    script = f"""
from pathlib import Path
from crossan_fast import _build
_build.AHEAD_OF_TIME = Path({str(folder.parent)!r})
_build.PARTS["probe"] = _build.Part("probe", ("probe",), lambda: [])
info = _build.load("probe")
assert info.ahead_of_time and info == _build.built("probe")
assert _build.torch.ops.crossan_fast_wheel.answer() == 42
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "building" not in result.stderr, result.stderr


@needs_compiler
def test_a_failure_is_a_reason_that_is_kept(probe, caplog):
    (_build.CSRC / "probe" / "probe.cpp").write_text("this is no C++\n")
    reason = _build.problem("probe")
    assert reason is not None and "do not compile" in reason and "error" in reason
    assert "building" in caplog.text and "built the probe" not in caplog.text
    caplog.clear()
    _build._outcome.cache_clear()
    again = _build.problem("probe")
    assert again is not None and "remove it to try again" in again
    assert "building" not in caplog.text


@needs_compiler
@pytest.mark.slow
def test_four_first_uses_at_once_wait_for_one_build(tmp_path):
    script = f"""
import sys
from pathlib import Path
from crossan_fast import _build
_build.CSRC = Path({str(tmp_path)!r}) / "csrc"
_build.PARTS["probe"] = _build.Part("probe", ("probe",), lambda: ["-O0"])
_build.load("probe")
assert _build.torch.ops.crossan_fast_probe.answer() == 42
"""
    (tmp_path / "csrc" / "probe").mkdir(parents=True)
    (tmp_path / "csrc" / "probe" / "probe.cpp").write_text(SOURCE)
    environment = {**os.environ, "CROSSAN_FAST_BUILD_DIR": str(tmp_path / "built")}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert sum("building" in text for text in said) == 1, said
    assert all("building" in text or "waiting for process" in text or not text for text in said), said


def test_without_a_compiler_the_reason_names_it(probe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _build.compiler_version.cache_clear()
    try:
        assert "no-such-compiler" in (_build.problem("probe") or "")
    finally:
        monkeypatch.undo()
        _build.compiler_version.cache_clear()


def test_an_unwritable_folder_is_a_reason(probe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(_build, "compiler_version", lambda: "some compiler")
    monkeypatch.setitem(_build.PARTS, "probe", replace(probe, missing=lambda: None))
    assert "CROSSAN_FAST_BUILD_DIR" in (_build.problem("probe") or "")


def test_a_library_for_another_torch_or_cpu_is_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "ops.so").touch()
    stamp = {
        "part": "cpu",
        "library": "ops.so",
        "torch": "1.0",
        "compiler": "c++",
        "instruction_set": "x86_64",
        "flags": [],
        "seconds": 1.0,
        "size": 0,
        "digest": hashlib.sha256(b"").hexdigest(),
        "ahead_of_time": True,
    }
    monkeypatch.setattr(_build, "AHEAD_OF_TIME", tmp_path)
    (folder / "stamp.json").write_text(json.dumps(stamp))
    info = _build.ahead_of_time("cpu")
    assert info is not None and "built for torch 1.0" in (_build._misfit(info) or "")
    info = replace(info, torch=_build.torch.__version__, instruction_set="warp_drive")
    assert "this CPU lacks warp_drive" in (_build._misfit(info) or "")
    info = replace(info, instruction_set="")
    assert _build._misfit(info) is None
    (folder / "ops.so").write_bytes(b"more")
    assert "has 4 bytes, its stamp says 0" in (_build._misfit(info) or "")
