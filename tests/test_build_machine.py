"""The build on first use where the machine fails it: killed compilers, full disks, damage, toolkits."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from crossan_fast import _build, _library

PLAIN = 'extern "C" int crossan_fast_probe() { return 42; }\n'
NO_COMPILER = _build.PARTS["cpu"].missing()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=f"cannot build: {NO_COMPILER}")


def forget() -> None:
    _build._outcome.cache_clear()
    _build.compiler_version.cache_clear()
    _build._toolkit_of.cache_clear()


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A part of one file without torch's headers, built below the test's own folder."""
    csrc = tmp_path / "csrc"
    (csrc / "probe").mkdir(parents=True)
    (csrc / "probe" / "probe.cpp").write_text(PLAIN)
    monkeypatch.setattr(_build, "CSRC", csrc)
    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path / "built"))
    part = _build.Part("probe", ("probe",), lambda: ["-O0"], missing=_build._no_compiler)
    monkeypatch.setitem(_build.PARTS, "probe", part)
    forget()
    yield part
    monkeypatch.undo()
    forget()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


TROUBLES = {
    "killed": "kill -9 $$",
    "full disk": 'echo "probe.cpp:1:1: fatal error: error writing to a.s: No space left on device"; exit 1',
    "errors, then killed": "echo 'probe.cpp:1:1: error: expected'; echo 'c++: error: Killed signal'; exit 1",
    "no header": 'echo "probe.cpp:1:1: fatal error: torch/library.h: No such file or directory"; exit 1',
    "silent": "exit 1",
}


@needs_compiler
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_the_machine_did_is_not_kept(probe, tmp_path, monkeypatch, trouble):
    """The next process builds, as soon as what stopped the compiler is over."""
    flag = tmp_path / "trouble"
    flag.touch()
    asked = f'case " $* " in *" -c "*) if [ -e {flag} ]; then {TROUBLES[trouble]}; fi;; esac'
    real = shutil.which(_build.compiler())
    monkeypatch.setenv("CXX", str(script(tmp_path / "bin" / "c++", f'{asked}\nexec {real} "$@"')))
    forget()
    reason = _build.problem("probe")
    assert reason is not None and "the next process tries again" in reason
    assert _build.failed("probe") is None
    assert not list(_build.build_folder(probe).glob("work-*"))
    flag.unlink()
    assert _build.problem("probe") == reason  # one try a process
    forget()
    assert _build.problem("probe") is None


@needs_compiler
def test_what_the_compiler_said_against_the_sources_is_kept_in_any_language(probe, monkeypatch):
    (_build.CSRC / "probe" / "probe.cpp").write_text("this is no C++\n")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "try again" not in (_build.problem("probe") or "try again")
    assert _build.failed("probe") is not None
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"


@pytest.mark.parametrize(
    "said, kept",
    [
        ("/a (b)/c.cpp:3:7: error: no member named 'x' in namespace 'std'", True),
        ("c.cpp:3: error: no", True),
        ('c.cu(12): error: identifier "x" is undefined', True),
        ("c.cpp:3:7: error: no\nfatal error: too many errors emitted, stopping now", True),
        ('c.cu(1): catastrophic error: cannot open source file "cuda_bf16.h"', False),
        ("/usr/bin/ld: cannot find -lcudart: No such file or directory", False),
        ("g++: fatal error: Killed signal terminated program cc1plus", False),
        ("c.cpp:9:1: internal compiler error: Segmentation fault", False),
        ("c.cpp:9:1: error: no\nninja: fatal: posix_spawn: Cannot allocate memory", False),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", False),
        ("ptxas fatal   : Memory allocation failure", False),
    ],
)
def test_only_errors_at_a_line_are_against_the_sources(said, kept):
    assert _library.against_sources(said) == kept


@needs_compiler
def test_a_killed_builder_and_compiler_leave_nothing_after_the_next_build(probe, tmp_path, monkeypatch):
    """Neither in the build's folder nor, of the compiler's drafts, in the one for temporary files."""
    drafts, flag = tmp_path / "drafts", tmp_path / "kill"
    drafts.mkdir()
    monkeypatch.setenv("TMPDIR", str(drafts))
    real = shutil.which(_build.compiler())
    kill = 'touch "$TMPDIR/ccdraft.s"; kill -9 $BUILDER $$'
    asked = f'case " $* " in *" -c "*) if rm {flag}; then {kill}; fi;; esac'
    monkeypatch.setenv("CXX", str(script(tmp_path / "bin" / "c++", f'{asked}\nexec {real} "$@"')))
    flag.touch()
    text = f"""
import os
from pathlib import Path
from crossan_fast import _build
_build.CSRC = Path({str(_build.CSRC)!r})
_build.PARTS["probe"] = _build.Part("probe", ("probe",), lambda: ["-O0"])
os.environ["BUILDER"] = str(os.getpid())
_build.load("probe")
"""
    for status in (-signal.SIGKILL, 0):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True)
        assert done.returncode == status, done.stderr
    left = [path.name for folder in (tmp_path / "built").iterdir() for path in folder.iterdir()]
    assert sorted(left) == ["builder", "crossan_fast_probe.so", "stamp.json"]
    assert not list(drafts.iterdir())
    assert os.environ["TMPDIR"] == str(drafts)


@needs_compiler
def test_a_compiler_that_outlives_its_builder_stops_no_other_build(probe, monkeypatch):
    """It may write to the folder of a build that was killed, while that is removed."""
    folder, remove = _build.build_folder(probe), shutil.rmtree
    (folder / "work-1").mkdir(parents=True)

    def written_to(path, ignore_errors=False):
        remove(path, ignore_errors)
        if Path(path).name == "work-1" and not (folder / "seen").exists():
            (folder / "seen").touch()
            path.mkdir()
            if not ignore_errors:
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", written_to)
    assert _build.problem("probe") is None
    assert (folder / "seen").exists() and not list(folder.glob("work-*"))


@needs_compiler
def test_processes_that_waited_for_a_failed_build_do_not_repeat_it(probe, monkeypatch):
    folder = _build.build_folder(probe)

    @contextlib.contextmanager
    def waited(folder, name):
        (folder / "trouble.txt").write_text("the disk was full")
        yield

    monkeypatch.setattr(_library, "_only_builder", waited)
    assert _build.problem("probe") == "the disk was full"
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["trouble.txt"]


@pytest.mark.sweep(1)
@needs_compiler
@pytest.mark.parametrize("left", [0.0, 0.5, None], ids=["empty", "cut short", "changed"])
def test_a_damaged_library_is_built_anew(probe, tmp_path, left):
    """One cut short, when loaded, kills the process by SIGBUS."""
    library = Path(_build.load("probe").library)
    good = library.read_bytes()
    copy = tmp_path / "copy"  # its own inode, since this process has the other one loaded
    copy.write_bytes(good[: int(len(good) * left)] if left is not None else good[:-1] + b"\x55")
    os.replace(copy, library)
    assert _build.built("probe") is None
    text = f"""
from pathlib import Path
from crossan_fast import _build
_build.CSRC = Path({str(_build.CSRC)!r})
_build.PARTS["probe"] = _build.Part("probe", ("probe",), lambda: ["-O0"])
_build.load("probe")
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "building anew" in done.stderr, (done.returncode, done.stderr)
    assert _build.built("probe") is not None


@needs_compiler
def test_a_library_that_can_not_be_loaded_is_built_once_and_says_why(probe, caplog):
    (_build.CSRC / "probe" / "probe.cpp").write_text("int absent();\nint probe = absent();\n")
    for said in ("building", ""):
        forget()
        reason = _build.problem("probe")
        assert reason is not None and "cannot be loaded" in reason and "absent" in reason
        assert said in caplog.text and bool(said) == bool(caplog.records)
        caplog.clear()


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit whose nvcc answers as nvcc does, and a script of that name on PATH which runs it."""
    home = tmp_path / "toolkit"
    answers = (
        'case "$*" in *--dryrun*) echo "#$ _HERE_=$(dirname $0)" >&2; echo "#$ TOP=$(dirname $0)/.." >&2;; '
        '*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";; '
        f'*) echo "$0 $*" >> {tmp_path}/called; exit 1;; esac'
    )
    script(home / "bin" / "nvcc", answers)
    script(tmp_path / "path" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield home
    forget()


def test_a_wrapper_on_path_is_asked_for_its_toolkit(toolkit, tmp_path, monkeypatch):
    assert _build.cuda_home() == toolkit
    assert _build.nvcc_version() == "13.0"
    (tmp_path / "path" / "nvcc").unlink()
    (tmp_path / "path" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    _build._toolkit_of.cache_clear()
    assert _build.cuda_home() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.cuda_home() is None  # what is named is taken, or nothing
    monkeypatch.setattr(_build.torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "_no_compiler", lambda: None)
    assert f"CUDA_HOME={tmp_path} has no bin/nvcc" in (_build.PARTS["cuda"].missing() or "")


@needs_compiler
def test_nvcc_of_that_toolkit_compiles(probe, toolkit, tmp_path, monkeypatch):
    (_build.CSRC / "probe" / "kernel.cu").write_text("__global__ void kernel() {}\n")
    flags = ["-std=c++20", "-gencode=arch=compute_80,code=sm_80"]
    part = replace(probe, nvcc_flags=lambda: flags, toolkit=_build.cuda_home)
    monkeypatch.setitem(_build.PARTS, "probe", part)
    assert "the next process tries again" in (_build.problem("probe") or "")
    called = (tmp_path / "called").read_text()
    assert called.startswith(f"{toolkit}/bin/nvcc ") and "-std=c++20" in called and "-std=c++17" not in called
    assert str(toolkit / "include") in called


def test_the_key_of_cuda_knows_the_toolkit_and_its_nvcc(toolkit, tmp_path, monkeypatch):
    part = _build.PARTS["cuda"]
    keys = [_build.build_key(part)]
    assert _build.build_key(part) == keys[0]
    other = tmp_path / "other"
    shutil.copytree(toolkit, other)
    monkeypatch.setenv("CUDA_HOME", str(other))
    keys.append(_build.build_key(part))
    nvcc = other / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("V13.0.88", "V13.0.99"))
    keys.append(_build.build_key(part))
    for name in ("NVCC_APPEND_FLAGS", "CC"):
        monkeypatch.setenv(name, "something")
        keys.append(_build.build_key(part))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_both_parts_name_the_standard_of_their_sources(name):
    """torch 2.11 would compile them as C++17, which lacks std::bit_cast."""
    assert "-std=c++20" in _build.PARTS[name].cxx_flags()
    assert name == "cpu" or "-std=c++20" in _build.PARTS[name].nvcc_flags()


def test_a_toolkit_of_another_cuda_is_refused_before_it_compiles(monkeypatch, tmp_path):
    script(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    monkeypatch.setattr(_build, "cuda_home", lambda: tmp_path)
    monkeypatch.setattr(_build.torch.version, "cuda", "13.0")
    assert _build.nvcc_version() == "11.8"
    reason = _build.PARTS["cuda"].missing()
    assert reason is not None and "holds CUDA 11.8, torch is built with 13.0 (install that toolkit" in reason
    monkeypatch.setattr(_build.torch.version, "cuda", "11.7")
    assert _build.PARTS["cuda"].missing() is None


def test_python_s_own_temporary_folder_is_not_the_build_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for once a process, and a build may be what first asks: its folder goes when it ends."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    with _library._environment(tmp_path):
        assert os.environ["TMPDIR"] == str(tmp_path)
        assert Path(tempfile.gettempdir()) != tmp_path
    assert Path(tempfile.gettempdir()) != tmp_path
