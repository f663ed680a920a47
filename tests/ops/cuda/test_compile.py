"""nvcc compiles every kernel for every target without spills; Hopper's path holds its instructions; the
bindings compile as they would for a GPU. Minutes: all in `.ci/long`."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[3] / "csrc"
SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))
NVCC = shutil.which("nvcc") or next(
    (str(p) for p in [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")] if p.exists()),
    None,
)
TOOLKITS = [
    *([Path(NVCC).resolve().parents[1]] if NVCC else []),
    Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
]
CUDA_INCLUDES = next(
    (t / "include" for t in TOOLKITS if (t / "include" / "cuda_runtime_api.h").exists()), None
)


# Blackwell takes the paths of sm_80: for it, what asks which GPU it is for, and one kernel that runs there.
BLACKWELL = ("side_network/hopper", "side_network/weight_gradient_hopper", "side_network/walk")


def _name(source: Path) -> str:
    """`side_network/walk`: files of two ops may share a name."""
    return source.relative_to(CSRC / "cuda").with_suffix("").as_posix()


def _jobs() -> list[tuple[Path, str]]:
    jobs = [(source, target) for source in SOURCES for target in ("80", "90a")]
    if NVCC is None:
        return jobs
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return jobs + [(s, "100a") for s in SOURCES if _name(s) in BLACKWELL and "compute_100" in known]


JOBS = _jobs()

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH, nor under CUDA_HOME or /usr/local/cuda"),
]


def _cubin(folder: Path, name: str, target: str) -> Path:
    return folder / f"{name.replace('/', '.')}.{target}.cubin"


@functools.cache
def _compile(folder: Path, target: str) -> dict[str, tuple[int, str]]:
    """Return code and messages of nvcc by source; cubins are left in `folder`."""

    def run(source: Path) -> tuple[str, tuple[int, str]]:
        architecture = f"arch=compute_{target},code=sm_{target}"
        done = subprocess.run(
            [
                NVCC,
                "-std=c++17",
                f"-I{CSRC}",
                "-cubin",
                "-gencode",
                architecture,
                "-Xptxas",
                "-v",
                str(source),
                "-Werror",
                "all-warnings",
                "-o",
                str(_cubin(folder, _name(source), target)),
            ],
            capture_output=True,
            text=True,
        )
        return _name(source), (done.returncode, done.stdout + done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, [source for source, wanted in JOBS if wanted == target]))


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize(
    "source, target",
    JOBS,
    ids=lambda part: _name(part) if isinstance(part, Path) else part,
)
def test_compiles_without_spills(cubins, source, target):
    code, messages = _compile(cubins, target)[_name(source)]
    assert code == 0, messages[-4000:]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", messages)
    assert spills if "global" in source.read_text() else not spills
    assert not any(map(int, spills)), messages[-4000:]
    # E.g. wgmma that the compiler had to wait for one by one.
    assert "Performance Loss" not in messages, messages[-4000:]


@pytest.mark.parametrize("source", sorted((CSRC / "cuda").rglob("*.cpp")), ids=_name)
def test_bindings_compile_for_a_gpu(tmp_path, source):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or CUDA_INCLUDES is None:
        pytest.skip("needs g++ or clang++, and CUDA's headers beside nvcc")
    # The one header of torch's that its CPU wheels leave out.
    missing = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [*cpp_extension.include_paths(), tmp_path, CUDA_INCLUDES, sysconfig.get_path("include")]
    flags = [
        f"-I{CSRC}",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        *(f"-isystem{folder}" for folder in folders),
    ]
    done = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "source, kernel, count, instructions",
    [
        # bf16 and fp16; forward and backward, one and two groups.
        (
            "side_network/hopper",
            "hopper_kernel",
            8,
            ("HGMMA.64x32x16.F32", "UBLKCP", ".MULTICAST", "STSM.16.MT88.4", "SYNCS"),
        ),
        (
            "side_network/weight_gradient_hopper",
            "weight_gradient_hopper",
            2,
            ("HGMMA.64x32x16.F32", ".tnspA.tnspB"),
        ),
    ],
)
def test_hopper_path_uses_hopper_instructions(cubins, source, kernel, count, instructions):
    knobs = pytest.importorskip("triton").knobs
    cuobjdump = shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path
    _compile(cubins, "90a")
    cubin = _cubin(cubins, source, "90a")
    listing = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    kernels = [k for k in listing.stdout.split("Function : ") if kernel in k.splitlines()[0]]
    assert len(kernels) == count
    for sass in kernels:
        for instruction in instructions:
            assert instruction in sass, f"{instruction} is missing"
        # Registers never spill to, or index, local memory.
        assert "LDL" not in sass and "STL" not in sass
