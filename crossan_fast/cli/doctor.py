"""`crossan-fast doctor`: what is installed, which backend each op uses, and why not another."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from crossan_fast import _build, _library
from crossan_fast._checks import nearest
from crossan_fast.cli._output import add_json, show, table
from crossan_fast.ops import _dispatch

_EXTRAS = {
    "transformers": "building caches: pip install 'crossan-fast[encoders]'",
    "pillow": "image encoders: pip install 'crossan-fast[encoders]'",
    "matplotlib": "plots: pip install 'crossan-fast[plot]'",
    "tensorboard": "tensorboard=true: pip install 'crossan-fast[tensorboard]'",
    "rich": "tables with lines in a terminal: pip install 'crossan-fast[tables]'",
    "xformers": "model.attention=xformers: pip install 'crossan-fast[xformers]'",
}

# What the library reads of the environment; its benchmarks and tests have names of their own.
_VARIABLES = (
    *("CROSSAN_FAST_AUTOTUNE", "CROSSAN_FAST_AUTOTUNE_FILE", "CROSSAN_FAST_BACKEND", "CROSSAN_FAST_BUILD"),
    *("CROSSAN_FAST_BUILD_DIR", "CROSSAN_FAST_CPU_BF16", "CROSSAN_FAST_CPU_L2", "CROSSAN_FAST_CUDA_ARCH"),
    *("CROSSAN_FAST_CXXFLAGS", "CROSSAN_FAST_DATA", "CROSSAN_FAST_MARCH"),
)
_OTHERS = re.compile("CROSSAN_FAST_(COMMIT|IISAN|PRETENDED_GPU|SUITE_.*|TEST_.*)")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed, which backend each op uses, and why",
        description="Show versions, compilers and devices, and for each op the backend that is picked on CPU "
        "and GPU, with the reasons against the others.",
    )
    parser.add_argument(
        "--build",
        action="store_true",
        help="build what the picked backends need and is not built yet, as their first use would (minutes)",
    )
    add_json(parser)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp64"), default="fp32", help="compute type (default fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    sections = {title: list(rows) for title, rows in _sections(args.dtype, args.build)}
    forced = os.environ.get("CROSSAN_FAST_BACKEND")
    lines = []
    for title, rows in sections.items():
        plain = "\n".join([title, *(f"  {name:<16} {text}" for name, text in rows)])
        lines += ["", table([{"": name, " ": text} for name, text in rows], plain, title=title)]
    said = f"CROSSAN_FAST_BACKEND={forced} takes the place of `auto`" if forced else "No backend is forced."
    show(args, {**sections, "forced backend": forced}, "\n".join([*lines, "", said]))
    return 0


def _sections(dtype: str, build: bool) -> Iterator[tuple[str, Iterable[tuple[str, str]]]]:
    """Titles with their rows, names beside what is to say of them."""
    yield "versions", _versions()
    yield "this machine", _machine()
    if variables := list(_variables()):
        yield "variables", variables
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    # First, since with --build choosing builds, and the extension's rows tell what there is.
    choices = {device: list(_choices(device, types[dtype], build)) for device in ("cpu", "cuda")}
    yield "compiled kernels", _extension()
    for device, rows in choices.items():
        yield f"ops on {device} in {dtype}", rows


def _versions() -> Iterator[tuple[str, str]]:
    from crossan_fast import __version__

    yield "crossan-fast", __version__
    yield "python", platform.python_version()
    for package in ("torch", "triton", "numpy", "safetensors"):
        yield package, _version(package) or "not installed"
    for package, use in _EXTRAS.items():
        yield package, _version(package) or f"not installed; needed for {use}"


def _machine() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "torch threads", str(torch.get_num_threads())
    if torch.version.cuda is None:
        yield "gpu", "this torch is built without CUDA; a CUDA build of torch is needed to use one"
    elif not torch.cuda.is_available():
        yield "gpu", f"none that torch (CUDA {torch.version.cuda}) can use; see nvidia-smi for the driver"
    else:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 1e9:.0f} GB"
            yield f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"
    yield "c++ compiler", _tool(_build.compiler(), "install g++ (or set CXX)")
    home = _build.cuda_home()
    nvcc = "nvcc" if home is None else str(home / "bin" / "nvcc")
    yield "nvcc", _tool(nvcc, "install the CUDA toolkit (or set CUDA_HOME) to build the CUDA kernels")
    with _library.ninja_on_path():
        yield "ninja", _tool("ninja", "pip install ninja")


def _variables() -> Iterator[tuple[str, str]]:
    """The CROSSAN_FAST_ variables that are set: a misspelt one changes nothing, and nothing else says so."""
    for name, value in sorted(os.environ.items()):
        if not name.startswith("CROSSAN_FAST_") or _OTHERS.fullmatch(name):
            continue
        known = name in _VARIABLES
        yield name, value if known else f"{value}  (nothing reads this name{nearest(name, _VARIABLES)})"


def _extension() -> Iterator[tuple[str, str]]:
    for name, part in _build.PARTS.items():
        info, missing = _build.built(name), part.missing()
        if refusal := _build.misfit(name):
            yield f"{name} wheel", f"the library in the wheel is passed over: {refusal}"
        if info is not None:
            how = f"compiled in {info.seconds:.0f} s"
            if info.ahead_of_time:
                how = f"came with the wheel, for {_build.march_of(info.flags)}"
            yield name, f"{how}: {info.library} ({info.instruction_set})"
            if said := _build.introspect(name):
                yield f"{name} library", said
        elif missing:
            yield name, f"cannot be built: {missing}"
        elif failure := _build.failed(name):
            yield name, f"did not compile, see {failure}; remove that file to try again"
        else:
            took = _about(_build.expected_seconds(name))
            yield name, f"not built yet; built on first use ({took}), or by `crossan-fast build`"
        if name == "cuda" and _build.nvcc_version() is not None:
            targets = ", ".join(f"sm_{target}" for target in _build.cuda_architectures())
            yield "cuda targets", f"{targets}, no PTX for others; CROSSAN_FAST_CUDA_ARCH=80;90a names targets"
    if _version("triton") is not None:
        yield "triton", _triton_kernels()


def _triton_kernels() -> str:
    from triton import knobs

    kept = sum(1 for _ in Path(knobs.cache.dir).glob("*/*.cubin"))
    return (
        "each kernel is compiled on its first use on a GPU (seconds), once for a model's sizes and types; "
        f"{knobs.cache.dir} keeps {kept:,}, of whatever program"
    )


def _about(seconds: float) -> str:
    return (
        f"about {max(10, round(seconds, -1)):.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} minutes"
    )


def _choices(device: str, dtype: torch.dtype, build: bool) -> Iterator[tuple[str, str]]:
    """Each op's pick, then every reason against a backend with the ops that it holds for."""
    against: dict[tuple[str, str], list[str]] = {}
    for op in _dispatch.OPS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", _dispatch.FallbackWarning)  # the reasons are printed below
                choice = (_dispatch.choose if build else _dispatch.foresee)(op, device, dtype)
        except _dispatch.BackendUnavailable as error:
            yield op, f"none: {error}"
            continue
        yield op, f"{choice.backend} ({choice.reason})"
        calls = _dispatch.REFERENCE_CALLS.get((op, device))
        if calls and choice.backend != "eager":
            yield "", f"but eager {calls}"
        for rejected in choice.rejected:
            against.setdefault(rejected, []).append(op)
    tried = sum((op, device) not in _dispatch.EAGER_BY_DESIGN for op in _dispatch.OPS)
    for (backend, reason), ops in against.items():
        whose = "any op" if len(ops) == tried else ", ".join(ops)
        yield f"not {backend}", f"for {whose}: {reason}"


def _tool(name: str, fix: str) -> str:
    path = shutil.which(name)
    if path is None:
        return f"not found; {fix}"
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in asked.stdout.splitlines() if re.search(r"\d\.\d", line)]
    return f"{path}: {lines[0].strip() if lines else 'version unknown'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
