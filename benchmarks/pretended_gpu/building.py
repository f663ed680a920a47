"""Compiles the two libraries of a GPU that is not there, and keeps them with what the package compiles."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import triton

from crossan_fast import _build

_FOLDER = Path(__file__).parent


@functools.cache
def built(source: str, name: str) -> Path:
    """The library `name` of a source here: C with Triton's `cuda.h`, or C++ with torch's headers."""
    command = [*(_with_cuda_h(name) if source.endswith(".c") else _with_torch()), "-shared", "-fPIC"]
    made_of = [(_FOLDER / source).read_text(), torch.__version__, triton.__version__, *command]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = _build.build_root() / "pretended_gpu" / digest / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as draft:
            made = Path(draft) / name
            subprocess.run([command[0], str(_FOLDER / source), "-o", str(made), *command[1:]], check=True)
            os.replace(made, library)
    return library


def _with_cuda_h(name: str) -> list[str]:
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    return [os.environ.get("CC", "cc"), f"-Wl,-soname,{name}", f"-I{include}"]


def _with_torch() -> list[str]:
    home = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = ["-std=c++20", abi, f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    return [_build.compiler(), *options, "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
