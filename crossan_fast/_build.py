"""Builds the compiled extension on first use, and says what is built and what is missing.

The extension has parts (`PARTS`), each a library of ops of its own. A part that came with the wheel (see
setup.py) is loaded; otherwise it is compiled once per combination of sources, compiler, torch and instruction
set, into `$CROSSAN_FAST_BUILD_DIR`, by default `~/.cache/crossan_fast`. Nothing here runs at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from crossan_fast import _levels, _library
from crossan_fast._library import BuildError, BuildInfo

CSRC = Path(__file__).resolve().parent / "csrc"
if not CSRC.is_dir():  # an editable install: csrc stands beside the package
    CSRC = Path(__file__).resolve().parent.parent / "csrc"
AHEAD_OF_TIME = Path(__file__).resolve().parent / "_libraries"

# The sources' own, named since torch's default differs by version (2.11 compiles extensions as C++17).
STANDARD = "-std=c++20"

_may_build: ContextVar[bool] = ContextVar("_may_build", default=True)


@dataclass(frozen=True)
class Part:
    """A library of compiled ops.

    Attributes:
        name: `cpu` or `cuda`.
        folders: below csrc/, whose sources it compiles and whose headers it includes, folders in them
            included.
        cxx_flags: the C++ compiler's flags, as a function since they depend on the machine.
        nvcc_flags: nvcc's, where it compiles `.cu` files.
        link_flags: the linker's.
        missing: why it can't be built here, or None.
        toolkit: CUDA's folder, where nvcc takes part.
        tools: what else decides what comes of the sources, for the key.
        work: seconds that one core compiles it, about, as measured with g++ 12 and nvcc 13.0.
    """

    name: str
    folders: tuple[str, ...]
    cxx_flags: Callable[[], list[str]]
    nvcc_flags: Callable[[], list[str]] = lambda: []
    link_flags: Callable[[], list[str]] = lambda: []
    missing: Callable[[], str | None] = lambda: None
    toolkit: Callable[[], Path | None] = lambda: None
    tools: Callable[[], list[str]] = lambda: []
    work: float = 90.0

    def sources(self) -> list[Path]:
        return sorted(f for d in self.folders for e in ("*.cpp", "*.cu") for f in (CSRC / d).rglob(e))

    def headers(self) -> list[Path]:
        found = [f for d in self.folders for e in ("*.h", "*.cuh") for f in (CSRC / d).rglob(e)]
        return sorted({*found, *CSRC.glob("*.h")})


def cpu_flags() -> list[str]:
    """The CPU's instruction set extensions, in the kernel's names; empty where it does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sorted(line.partition(":")[2].split())
    return []


def instruction_set() -> str:
    """The extensions that decide which kernels run, for messages: `x86_64 avx2 avx512f avx512_bf16`."""
    decisive = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
    have = set(cpu_flags())
    return " ".join([platform.machine(), *(flag for flag in decisive if flag in have)])


def vectors() -> str:
    """The widest vectors of the CPU that this runs on, in words: `AVX-512`, `AVX2`."""
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse2": "SSE", "sve": "SVE", "asimd": "NEON"}
    have = set(cpu_flags())
    return next((name for flag, name in names.items() if flag in have), f"{platform.machine()}'s vectors")


def cpu_kind() -> str:
    """Whose CPU this is, its widest vectors, and AMX, as measurements are told apart: `AMD with AVX-512`."""
    makers = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}
    units = f"{vectors()} and AMX" if "amx_bf16" in cpu_flags() else vectors()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if maker := next((name for word, name in makers.items() if word in text), None):
            return f"{maker} with {units}"
    return f"{platform.machine()} with {units}"


def compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def compiler_version() -> str | None:
    """First line of `c++ --version`, or None without a compiler."""
    try:
        result = subprocess.run([compiler(), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else None


def cpu_cxx_flags() -> list[str]:
    """Optimized for the CPU it runs on; `CROSSAN_FAST_MARCH` names another, e.g. `x86-64-v3` for a wheel.

    `CROSSAN_FAST_CXXFLAGS` is appended, e.g. a sanitizer's flags.
    """
    march = os.environ.get("CROSSAN_FAST_MARCH", "native")
    flags = [STANDARD, "-O3", f"-march={march}"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    if march == "native" and "avx512f" in cpu_flags():
        flags.append("-mprefer-vector-width=512")
    return flags + os.environ.get("CROSSAN_FAST_CXXFLAGS", "").split()


def cpu_march() -> str:
    """The instruction set that the CPU part is compiled for: its own flags' where it came with the wheel."""
    shipped = ahead_of_time("cpu")
    return march_of(cpu_cxx_flags() if shipped is None or _misfit(shipped) else shipped.flags)


def march_of(flags: list[str]) -> str:
    """What the last of a compiler's flags for it says: `native`, `x86-64-v3`."""
    return next((flag[7:] for flag in reversed(flags) if flag.startswith("-march=")), "?")


def _no_compiler() -> str | None:
    if sys.platform == "win32":
        return "the extension is not built on Windows"
    if compiler_version() is None:
        return f"no C++ compiler: `{compiler()} --version` fails (install g++ or set CXX)"
    try:
        import ninja  # noqa: F401
    except ImportError:
        if shutil.which("ninja") is None:
            return "ninja is missing (pip install ninja)"
    return None


def cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME or CUDA_PATH, the one that nvcc on PATH says it is of, /usr/local/cuda.

    The order is torch's, but torch takes the folder above a wrapper of nvcc for the toolkit.
    """
    if named := _named_cuda_home():
        home = Path(named)
    elif nvcc := shutil.which("nvcc"):
        home = _toolkit_of(nvcc)
    else:
        home = Path("/usr/local/cuda")
    return home if (home / "bin" / "nvcc").exists() else None


def _named_cuda_home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


@functools.cache
def _toolkit_of(nvcc: str) -> Path:
    """The folder that an nvcc works from, asked of itself since it may be a script that runs another."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
        )
        top = re.search(r"^#\$ TOP=(.+)$", asked.stderr + asked.stdout, re.MULTILINE)
        if top and (home := Path(top[1].strip()).resolve()).joinpath("bin", "nvcc").exists():
            return home
    return Path(nvcc).resolve().parent.parent


def _nvcc() -> list[str]:
    """The command that torch's extensions compile with; PYTORCH_NVCC names another, e.g. `ccache nvcc`."""
    home = cuda_home()
    own = [] if home is None else [str(home / "bin" / "nvcc")]
    return shlex.split(os.environ.get("PYTORCH_NVCC", "")) or own


def _nvcc_says() -> str:
    """What `nvcc --version` prints, or nothing without one."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if command := _nvcc():
            return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    return ""


def nvcc_version() -> str | None:
    """`13.0` of the toolkit that would compile, or None without one."""
    found = re.search(r"release (\d+\.\d+)", _nvcc_says())
    return found[1] if found else None


def cuda_tools() -> list[str]:
    """The toolkit, its nvcc, and what both take from the environment."""
    named = ("PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CC")
    return [str(cuda_home()), _nvcc_says(), *(f"{name}={os.environ.get(name, '')}" for name in named)]


def cuda_architectures() -> list[str]:
    """What nvcc compiles for: the GPUs that are here, else A100 and Hopper.

    `CROSSAN_FAST_CUDA_ARCH` names others, e.g. `80;90a` for a wheel. Hopper is `90a`: wgmma exists nowhere
    else.
    """
    if named := os.environ.get("CROSSAN_FAST_CUDA_ARCH"):
        return named.replace(".", "").split(";")
    if not torch.cuda.is_available():
        return ["80", "90a"]
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ["90a" if c == (9, 0) else f"{c[0]}{c[1]}" for c in sorted(capabilities)]


def cuda_nvcc_flags() -> list[str]:
    return [STANDARD, "-O3", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_architectures())]


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA (install one that is: https://pytorch.org/get-started)"
    if reason := _no_compiler():
        return reason
    if cuda_home() is None and (named := _named_cuda_home()):
        return f"CUDA_HOME={named} has no bin/nvcc (name the folder of a CUDA {torch.version.cuda} toolkit)"
    if cuda_home() is None:
        return f"nvcc is missing (install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME)"
    version = nvcc_version()
    if version is not None and version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return (
            f"{cuda_home()} holds CUDA {version}, torch is built with {torch.version.cuda} "
            f"(install that toolkit, or set CUDA_HOME to one of CUDA {torch.version.cuda.partition('.')[0]})"
        )
    return None


PARTS: dict[str, Part] = {
    "cpu": Part("cpu", ("cpu",), cpu_cxx_flags, missing=_no_compiler),
    "cuda": Part(
        "cuda",
        ("cuda",),
        lambda: [STANDARD, "-O2"],
        cuda_nvcc_flags,
        missing=_no_cuda,
        toolkit=cuda_home,
        tools=cuda_tools,
        work=200.0,
    ),
}


def has_source(name: str, op: str) -> bool:
    """Whether a part has kernels for an op: a file or folder of its name."""
    places = [CSRC / folder / op for folder in PARTS[name].folders]
    return any(place.is_dir() or place.with_suffix(".cpp").is_file() for place in places)


def build_root() -> Path:
    """Where libraries compiled on first use are kept."""
    if folder := os.environ.get("CROSSAN_FAST_BUILD_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossan_fast"


def build_key(part: Part) -> str:
    """Changes with everything the library depends on."""
    digest = hashlib.sha256()
    parts = [torch.__version__, compiler(), compiler_version() or ""]
    parts += [platform.machine(), " ".join(cpu_flags())]
    parts += [*part.cxx_flags(), *part.nvcc_flags(), *part.link_flags(), *part.tools()]
    digest.update("\0".join(parts).encode())
    for path in (*part.sources(), *part.headers()):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_folder(part: Part) -> Path:
    return build_root() / f"{part.name}-{build_key(part)}"


def problem(name: str) -> str | None:
    """Load a part, building it if it has to be; None, or why it is not available."""
    if not _may_build.get() and built(name) is None:
        part = PARTS[name]
        failure = failed(name)
        return part.missing() or (f"it did not compile, see {failure}" if failure else None)
    return _outcome(name)[1]


@contextlib.contextmanager
def foreseeing() -> Iterator[None]:
    """Where nothing is built: `problem` tells of a part that is not built yet what is known before."""
    token = _may_build.set(False)
    try:
        yield
    finally:
        _may_build.reset(token)


def load(name: str) -> BuildInfo:
    """Load a part's ops into this process, building them first where nothing fitting is there.

    Raises:
        BuildError: it can't be built or loaded.
    """
    info, reason = _outcome(name)
    if info is None:
        raise BuildError(reason)
    return info


@functools.cache
def _outcome(name: str) -> tuple[BuildInfo | None, str | None]:
    """What came of loading a part, which is tried once a process: it, or why it is not available."""
    try:
        info = _available(name)
        _load_library(Path(info.library))
    except BuildError as error:
        return None, str(error)
    return info, None


def _available(name: str) -> BuildInfo:
    part = PARTS[name]
    if (shipped := ahead_of_time(name)) is not None:
        refusal = _misfit(shipped)
        if refusal is None:
            return shipped
        if part.missing() is not None:
            raise BuildError(f"the {name} library in the wheel does not fit ({refusal}) and {part.missing()}")
    if reason := part.missing():
        raise BuildError(reason)
    return _library.obtain(_recipe(part), build_folder(part))


def built(name: str) -> BuildInfo | None:
    """What `load` would load without building: for `doctor`."""
    part = PARTS[name]
    shipped = ahead_of_time(name)
    if shipped is not None and _misfit(shipped) is None:
        return shipped
    return None if part.missing() else _library.whole(build_folder(part))


def expected_seconds(name: str) -> float:
    """How long a build takes here, about: as long as the last one of this part, else by its work."""
    stamps = sorted(build_root().glob(f"{name}-*/stamp.json"), key=lambda path: path.stat().st_mtime_ns)
    for stamp in reversed(stamps):
        if (info := _library.read_stamp(stamp.parent)) is not None:
            return info.seconds
    part, asked = PARTS[name], os.environ.get("MAX_JOBS", "")  # torch's bound on ninja
    cores = int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1
    return part.work / min(cores, len(part.sources()))


def failed(name: str) -> Path | None:
    """What the compiler said when this build failed before; it is not tried again while the file is there."""
    part = PARTS[name]
    return None if part.missing() else _library.kept_failure(build_folder(part))


def misfit(name: str) -> str | None:
    """Why the library that came with the wheel is passed over, or None where it fits or none came."""
    shipped = ahead_of_time(name)
    return None if shipped is None else _misfit(shipped)


def introspect(name: str) -> str | None:
    """What a built part's library says about itself: its vectors, its compiler, which bf16 products it takes.

    None where it is not built, can't be loaded, or has nothing to say (`cuda`).
    """
    if name != "cpu" or built(name) is None or problem(name) is not None:
        return None
    return str(torch.ops.crossan_fast_cpp.build_info())


def ahead_of_time(name: str) -> BuildInfo | None:
    """The library that came with the wheel; of several the best that fits, else the one that needs least."""
    folders = [AHEAD_OF_TIME / name, *(AHEAD_OF_TIME / f"{name}-{m}" for m in reversed(_levels.LEVELS))]
    held = [info for folder in folders if (info := _library.read_stamp(folder)) is not None]
    return next((info for info in held if _misfit(info) is None), held[-1] if held else None)


def compile_into(name: str, folder: Path) -> BuildInfo:
    """Compile a part for the wheel: its library and stamp, and nothing else, in `folder`.

    Whatever changes the library afterwards, e.g. strips it, has to stamp it anew; it is not loaded otherwise.

    Raises:
        BuildError: it can't be built.
    """
    part = PARTS[name]
    if reason := part.missing():
        raise BuildError(reason)
    return _library.make(_recipe(part), folder, ahead_of_time=True)


def _recipe(part: Part) -> _library.Recipe:
    flags = part.cxx_flags()
    return _library.Recipe(
        part.name,
        part.sources(),
        CSRC,
        flags,
        part.nvcc_flags(),
        part.link_flags(),
        compiler_version() or "",
        _levels.needed(march_of(flags)) or instruction_set(),
        part.toolkit(),
        expected_seconds(part.name),
    )


def _misfit(info: BuildInfo) -> str | None:
    if info.torch != torch.__version__:
        return f"built for torch {info.torch}, this is {torch.__version__}"
    if lacking := set(info.instruction_set.split()) - {platform.machine(), *cpu_flags()}:
        return f"this CPU lacks {', '.join(sorted(lacking))}"
    return _library.damage(info)


def _load_library(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = f"{library} cannot be loaded: {error.__cause__ or error}"
        raise BuildError(f"{reason} (remove {library.parent} to build it anew)") from error
