"""Builds csrc/cuda for the host: the CUDA sources on the emulator, behind the same checks and bindings."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[3] / "csrc"


def _build(folder: Path, compiler: str) -> Path:
    """The library for the sources as they are now; compiled at most once for each state of them."""
    files = sorted(p for p in (CSRC / "cuda").rglob("*") if p.suffix in (".cu", ".cpp", ".h", ".cuh"))
    state = hashlib.sha256(torch.__version__.encode())
    for file in (*files, *CSRC.glob("*.h")):
        state.update(file.relative_to(CSRC).as_posix().encode() + b"\0" + file.read_bytes())
    library = folder / f"emulated-{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    work = folder / f"build-{os.getpid()}"
    work.mkdir(exist_ok=True)
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    common = [f"-I{CSRC}", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

    def compile_one(source: Path) -> Path:
        target = work / (".".join(source.relative_to(CSRC).parts) + ".o")
        mode = ["-O1", *includes, "-DCROSSAN_EMULATE_CUDA"] if source.suffix == ".cpp" else ["-O2", "-xc++"]
        _run([compiler, *common, *mode, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, (f for f in files if f.suffix in (".cu", ".cpp"))))
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    finished = work / "finished.so"
    torch_libraries += ["-lc10", "-ltorch", "-ltorch_cpu"]
    _run([compiler, "-shared", *map(str, objects), "-o", str(finished), *torch_libraries])
    os.replace(finished, library)
    shutil.rmtree(work)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The library takes two minutes to build, its cases seconds each: `.ci/long` runs them."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "library" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Fresh memory holds NaNs (bytes of ones in workspaces), so that what nothing wrote shows."""


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("the emulated CUDA kernels need g++ or clang++")
    folder = request.config.cache.mkdir("crossan_cuda")
    with open(folder / "lock", "w") as lock:  # or every worker would build it, each at half the speed
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = _build(folder, compiler)
    torch.ops.load_library(str(path))
    return CDLL(str(path))


@pytest.fixture
def emulate(library: CDLL) -> Callable[..., None]:
    """Sets the emulator: the seed of its thread order, and the device that it stands for."""

    def set_device(seed: int = 1, architecture: int = 80, processors: int = 4, shared: int = 163 * 1024):
        library.crossan_emulate(seed, architecture, processors, shared)

    set_device()
    return set_device


@pytest.fixture
def ops(emulate):
    return torch.ops.crossan_fast_cuda_emulated
