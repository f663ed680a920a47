"""Builds the compiled extension on first use, and says what is built and what is missing.

The extension has parts (`PARTS`), each a library of ops of its own. A part that came with the wheel (see
setup.py) is loaded; otherwise it is compiled once per combination of sources, compiler, torch and instruction
set, into `$CROSSAN_FAST_BUILD_DIR`, by default `~/.cache/crossan_fast`. Nothing here runs at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parent / "csrc"
if not CSRC.is_dir():  # an editable install: csrc stands beside the package
    CSRC = Path(__file__).resolve().parent.parent / "csrc"
AHEAD_OF_TIME = Path(__file__).resolve().parent / "_libraries"


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
    """

    name: str
    folders: tuple[str, ...]
    cxx_flags: Callable[[], list[str]]
    nvcc_flags: Callable[[], list[str]] = lambda: []
    link_flags: Callable[[], list[str]] = lambda: []
    missing: Callable[[], str | None] = lambda: None

    def sources(self) -> list[Path]:
        return sorted(f for d in self.folders for e in ("*.cpp", "*.cu") for f in (CSRC / d).rglob(e))

    def headers(self) -> list[Path]:
        found = [f for d in self.folders for e in ("*.h", "*.cuh") for f in (CSRC / d).rglob(e)]
        return sorted({*found, *CSRC.glob("*.h")})


@dataclass(frozen=True)
class BuildInfo:
    """What a built library is made of: the stamp beside it, and a row of `crossan-fast doctor`."""

    part: str
    library: str
    torch: str
    compiler: str
    instruction_set: str
    flags: list[str]
    seconds: float
    ahead_of_time: bool = False


class BuildError(RuntimeError):
    """A part is not available; the message says why and what would help."""


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
    flags = ["-O3", f"-march={march}", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    if march == "native" and "avx512f" in cpu_flags():
        flags.append("-mprefer-vector-width=512")
    if sys.platform != "darwin":
        # At compile time only: the symbols resolve to the OpenMP runtime that torch brings, so that torch's
        # threads are ours; linking another would bring a second pool of threads.
        flags.append("-fopenmp")
    return flags + os.environ.get("CROSSAN_FAST_CXXFLAGS", "").split()


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
    """The toolkit's folder, found as torch's extensions find it: CUDA_HOME, then nvcc on PATH."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return Path(home) if home and (Path(home) / "bin" / "nvcc").exists() else None


def nvcc_version() -> str | None:
    """`13.0` of the toolkit that would compile, or None without one."""
    home = cuda_home()
    if home is None:
        return None
    try:
        asked = subprocess.run(
            [home / "bin" / "nvcc", "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", asked.stdout)
    return found[1] if found else None


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
    return ["-O3", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_architectures())]


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA (install one that is: https://pytorch.org/get-started)"
    if reason := _no_compiler():
        return reason
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
    "cuda": Part("cuda", ("cuda",), lambda: ["-O2"], cuda_nvcc_flags, missing=_no_cuda),
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
    parts = [torch.__version__, compiler_version() or "", platform.machine(), " ".join(cpu_flags())]
    parts += [*part.cxx_flags(), *part.nvcc_flags(), *part.link_flags()]
    digest.update("\0".join(parts).encode())
    for path in (*part.sources(), *part.headers()):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_folder(part: Part) -> Path:
    return build_root() / f"{part.name}-{build_key(part)}"


@functools.cache
def problem(name: str) -> str | None:
    """Load a part, building it if it has to be; None, or why it is not available."""
    try:
        load(name)
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def load(name: str) -> BuildInfo:
    """Load a part's ops into this process, building them first where nothing fitting is there.

    Raises:
        BuildError: it can't be built or loaded.
    """
    part = PARTS[name]
    if (shipped := ahead_of_time(name)) is not None:
        refusal = _misfit(shipped)
        if refusal is None:
            _load_library(Path(shipped.library))
            return shipped
        if part.missing() is not None:
            raise BuildError(f"the {name} library in the wheel does not fit ({refusal}) and {part.missing()}")
    if reason := part.missing():
        raise BuildError(reason)
    info = _built(part)
    _load_library(Path(info.library))
    return info


def built(name: str) -> BuildInfo | None:
    """What `load` would load without building: for `doctor`."""
    part = PARTS[name]
    shipped = ahead_of_time(name)
    if shipped is not None and _misfit(shipped) is None:
        return shipped
    return None if part.missing() else _read_stamp(build_folder(part))


def failed(name: str) -> Path | None:
    """What the compiler said when this build failed before; it is not tried again while the file is there."""
    part = PARTS[name]
    failure = build_folder(part) / "failure.txt"
    return failure if part.missing() is None and failure.is_file() else None


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
    """The library that came with the wheel, whether or not it fits this machine."""
    info = _read_stamp(AHEAD_OF_TIME / name)
    return info and replace(info, library=str(AHEAD_OF_TIME / name / info.library))


def compile_into(name: str, folder: Path) -> BuildInfo:
    """Compile a part for the wheel: its library and stamp, and nothing else, in `folder`.

    Raises:
        BuildError: it can't be built.
    """
    part = PARTS[name]
    if reason := part.missing():
        raise BuildError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        info = _compile(part, Path(scratch))
        library = folder / f"crossan_fast_{name}.so"
        shutil.copyfile(info.library, library)
    info = replace(info, library=library.name, ahead_of_time=True)
    _write(folder / "stamp.json", json.dumps(asdict(info), indent=1))
    return info


def _misfit(info: BuildInfo) -> str | None:
    if info.torch != torch.__version__:
        return f"built for torch {info.torch}, this is {torch.__version__}"
    lacking = set(info.instruction_set.split()) - set(instruction_set().split())
    return f"this CPU lacks {', '.join(sorted(lacking))}" if lacking else None


def _load_library(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from error


def _built(part: Part) -> BuildInfo:
    folder = build_folder(part)
    if (info := _read_stamp(folder)) is not None:
        return info
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder, part.name):
            if (info := _read_stamp(folder)) is not None:  # another process built it while this one waited
                return info
            failure = folder / "failure.txt"
            if failure.is_file():
                raise BuildError(f"{failure.read_text()}\n(kept in {failure}; remove it to try again)")
            return _compile(part, folder)
    except OSError as error:
        raise BuildError(
            f"cannot build in {folder}: {error} (CROSSAN_FAST_BUILD_DIR names another)"
        ) from error


def _compile(part: Part, folder: Path) -> BuildInfo:
    from torch.utils import cpp_extension

    name = f"crossan_fast_{part.name}"
    stale = folder / "lock"  # torch's own; whoever made it is gone, since this process holds ours
    if stale.exists():
        _say(f"removing {stale}, left by a build that was interrupted")
        stale.unlink()
    sources = part.sources()
    started = time.monotonic()
    _say(f"building the {part.name} kernels ({len(sources)} files, {compiler_version()}) ...", end=" ")
    try:
        with ninja_on_path():
            cpp_extension.load(
                name,
                [str(unit) for unit in _units(sources, folder / "units")],
                extra_cflags=part.cxx_flags(),
                extra_cuda_cflags=part.nvcc_flags(),
                extra_ldflags=part.link_flags(),
                extra_include_paths=[str(CSRC)],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, subprocess.CalledProcessError, ImportError) as error:
        _say("failed", start="")
        text = f"the {part.name} kernels do not compile with {compiler_version()}:\n{str(error)[-4000:]}"
        _write(folder / "failure.txt", text)
        raise BuildError(text) from error
    seconds = time.monotonic() - started
    _say(f"{seconds:.0f} s, kept in {folder}", start="")
    # torch numbers a second build of one name in a process: crossan_fast_cpu_v1.so.
    library = max(folder.glob(f"{name}*.so"), key=lambda path: path.stat().st_mtime_ns)
    info = BuildInfo(
        part.name,
        str(library),
        torch.__version__,
        compiler_version() or "",
        instruction_set(),
        part.cxx_flags() + part.nvcc_flags(),
        round(seconds, 1),
    )
    _write(folder / "stamp.json", json.dumps(asdict(info), indent=1))
    return info


def _units(sources: list[Path], folder: Path) -> list[Path]:
    """A file for each source that includes it and is named by its path: torch names objects by base name."""
    folder.mkdir(exist_ok=True)
    units = []
    for source in sources:
        path = source.relative_to(CSRC)
        units.append(folder / ".".join(path.parts))
        if not units[-1].exists():  # else a build that was interrupted would begin again
            _write(units[-1], f'#include "{path.as_posix()}"\n')
    return units


def _say(text: str, start: str = "crossan_fast: ", end: str = "\n") -> None:
    print(start + text, end=end, file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_stamp(folder: Path) -> BuildInfo | None:
    try:
        info = BuildInfo(**json.loads((folder / "stamp.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return info if (folder / info.library).is_file() else None


@contextlib.contextmanager
def ninja_on_path() -> Iterator[None]:
    """The pip package's ninja, which lies off PATH where a virtual environment is not activated."""
    before = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([before, ninja.BIN_DIR])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _only_builder(folder: Path, name: str, patience: float = 900.0) -> Iterator[None]:
    """Hold the folder's lock, which ends with its holder, however that ends: it is never stale."""
    import fcntl

    path = folder / "builder"
    with open(path, "a+") as file:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not told:
                _say(f"waiting for {holder}, which builds the {name} kernels")
                told = True
            if time.monotonic() - started > patience:
                raise BuildError(
                    f"{holder} has held {path} for more than {patience:.0f} s; "
                    "end it, or name another CROSSAN_FAST_BUILD_DIR"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
