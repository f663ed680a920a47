"""A compiled library in its folder: made whole under a lock, stamped, and checked before it is loaded.

The folder holds `stamp.json` and the library that it names, or `failure.txt`, what the compiler said against
the sources. Beside them: `builder`, the lock; `work-*/` while a build runs; `trouble.txt` after one that the
machine stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from crossan_fast._files import put_in_place, write_whole

_logger = logging.getLogger(__name__)

# An error at a line of a file, as gcc and clang (`a.cpp:3:1: error:`) and nvcc (`a.cu(3): error:`) write it.
_AGAINST_SOURCES = re.compile(r"^.+(:\d+(:\d+)?:|\(\d+\):) error\b", re.MULTILINE)
# What a compiler says where the machine stopped it. A `fatal error` is a file that it can't read or write:
# another package's header, or one on a full disk. clang also says so when it counted too many errors.
_AGAINST_MACHINE = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error|Permission denied"
    r"|Too many open files|Resource temporarily unavailable|Cannot allocate memory|[Oo]ut of memory"
    r"|memory exhausted|internal compiler error|\bKilled\b|\bTerminated\b|Segmentation fault|signal \d+"
    r"|(fatal|catastrophic) error(?!: too many errors)"
)


class BuildError(RuntimeError):
    """A part is not available; the message says why and what would help."""


@dataclass(frozen=True)
class Recipe:
    """What to compile, and with what.

    Attributes:
        part: whose library it is, for its name and for messages.
        toolkit: CUDA's folder, where nvcc takes part.
        seconds: about so many it takes, for the announcement.
    """

    part: str
    sources: list[Path]
    include: Path
    cxx_flags: list[str]
    nvcc_flags: list[str]
    link_flags: list[str]
    compiler: str
    instruction_set: str
    toolkit: Path | None = None
    seconds: float = 60.0


@dataclass(frozen=True)
class BuildInfo:
    """What a built library is made of: the stamp beside it, and a row of `crossan-fast doctor`.

    Attributes:
        library: the file, by its name in the stamp and by its path elsewhere.
        size, digest: of the library, in bytes and by SHA-256.
    """

    part: str
    library: str
    torch: str
    compiler: str
    instruction_set: str
    flags: list[str]
    seconds: float
    size: int
    digest: str
    ahead_of_time: bool = False


def read_stamp(folder: Path) -> BuildInfo | None:
    """The folder's stamp, whether or not its library is whole; None without one."""
    try:
        info = BuildInfo(**json.loads((folder / "stamp.json").read_text(encoding="utf-8")))
        return replace(info, library=str(folder / Path(info.library).name))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def damage(info: BuildInfo) -> str | None:
    """How the library differs from its stamp, or None; loading one that was cut short kills the process."""
    try:
        content = Path(info.library).read_bytes()
    except OSError as error:
        return f"{info.library} cannot be read: {error.strerror}"
    if len(content) != info.size:
        return f"{info.library} has {len(content)} bytes, its stamp says {info.size}"
    if hashlib.sha256(content).hexdigest() != info.digest:
        return f"{info.library} is not the file that its stamp describes: the SHA-256 differs"
    return None


def whole(folder: Path) -> BuildInfo | None:
    """The folder's library where it is there as it was built."""
    info = read_stamp(folder)
    return info if info is not None and damage(info) is None else None


def kept_failure(folder: Path) -> Path | None:
    """What the compiler said against the sources; a build is not tried again while the file is there."""
    failure = folder / "failure.txt"
    return failure if failure.is_file() else None


def obtain(recipe: Recipe, folder: Path) -> BuildInfo:
    """The library in `folder`, compiled first unless it is there whole; of many processes one compiles.

    Raises:
        BuildError: it can't be compiled.
    """
    if (info := whole(folder)) is not None:
        return info
    came = time.time_ns()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder, recipe.part):
            if (info := whole(folder)) is not None:  # another process built it while this one waited
                return info
            if failure := kept_failure(folder):
                raise BuildError(
                    f"{failure.read_text(encoding='utf-8')}\n(kept in {failure}; remove it to try again)"
                )
            trouble = folder / "trouble.txt"
            if trouble.is_file() and trouble.stat().st_mtime_ns > came:  # the build that this one waited for
                raise BuildError(trouble.read_text(encoding="utf-8"))
            return make(recipe, folder)
    except OSError as error:
        raise BuildError(
            f"cannot build in {folder}: {error} (CROSSAN_FAST_BUILD_DIR names another)"
        ) from error


def make(recipe: Recipe, folder: Path, ahead_of_time: bool = False) -> BuildInfo:
    """Compile the library and its stamp into `folder`, each whole or not at all.

    Raises:
        BuildError: it can't be compiled.
        OSError: the folder can't be written.
    """
    if (former := read_stamp(folder)) is not None and (reason := damage(former)):
        _logger.warning("building anew, since %s", reason)
    for left in folder.glob("work-*"):
        _logger.warning("removing %s, left by a build that was interrupted", left)
        # What its builder had started may still write there, until it misses what is removed.
        shutil.rmtree(left, ignore_errors=True)
    # A new one each time: nothing that was cut short is taken for whole, and torch, which remembers where a
    # process built before, compiles.
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    try:
        started = time.monotonic()
        # Seen wherever no handler is set, too: nobody should wonder what a minute without a word is for.
        _logger.warning(announcement(recipe, folder))
        made = _compile(recipe, work, folder)
        seconds = time.monotonic() - started
        content = made.read_bytes()
        library = folder / f"crossan_fast_{recipe.part}.so"
        # Moved, not copied: torch has loaded it where it was made, and a copy would register the ops again.
        put_in_place(made, library)
        _logger.warning("built the %s kernels in %.0f s, kept in %s", recipe.part, seconds, folder)
    finally:
        for each in folder.glob("work-*"):  # this build's, and what was written after the removal above
            shutil.rmtree(each, ignore_errors=True)
    info = BuildInfo(
        recipe.part,
        library.name,
        torch.__version__,
        recipe.compiler,
        recipe.instruction_set,
        recipe.cxx_flags + recipe.nvcc_flags,
        round(seconds, 1),
        len(content),
        hashlib.sha256(content).hexdigest(),
        ahead_of_time,
    )
    write_whole(folder / "stamp.json", json.dumps(asdict(info), indent=1))
    (folder / "trouble.txt").unlink(missing_ok=True)
    return replace(info, library=str(library))


def _compile(recipe: Recipe, work: Path, folder: Path) -> Path:
    from torch.utils import cpp_extension

    name = f"crossan_fast_{recipe.part}"
    try:
        with _environment(work), _toolkit(recipe.toolkit):
            cpp_extension.load(
                name,
                [str(unit) for unit in _units(recipe, work)],
                extra_cflags=recipe.cxx_flags,
                extra_cuda_cflags=recipe.nvcc_flags,
                extra_ldflags=recipe.link_flags,
                extra_include_paths=[str(recipe.include)],
                build_directory=str(work),
                is_python_module=False,
            )
    except (RuntimeError, subprocess.CalledProcessError, ImportError) as error:
        said = str(error)
        text = f"the {recipe.part} kernels do not compile with {recipe.compiler}:\n{said[-4000:]}"
        keep = against_sources(said)
        if not keep:
            text += "\n(not an error of the sources: the next process tries again)"
        write_whole(folder / ("failure.txt" if keep else "trouble.txt"), text)
        raise BuildError(text) from error
    except OSError as error:
        # torch also loads what it built; an error without a number says that it can't, which `load` repeats.
        if error.errno is not None or not any(work.glob(f"{name}*.so")):
            raise
    # torch numbers a second build of one name in a process: crossan_fast_cpu_v1.so.
    return max(work.glob(f"{name}*.so"), key=lambda path: path.stat().st_mtime_ns)


def _units(recipe: Recipe, work: Path) -> list[Path]:
    """A file for each source that includes it and is named by its path: torch names objects by base name."""
    units = []
    for source in recipe.sources:
        path = source.relative_to(recipe.include)
        units.append(work / ".".join(path.parts))
        units[-1].write_text(f'#include "{path.as_posix()}"\n')
    return units


def against_sources(said: str) -> bool:
    """Whether to compile anew is to fail anew: there are errors in the sources, and nothing else happened."""
    return _AGAINST_SOURCES.search(said) is not None and _AGAINST_MACHINE.search(said) is None


def announcement(recipe: Recipe, folder: Path) -> str:
    """What a build is about to do, and for how long."""
    return (
        f"building the {recipe.part} kernels, once: {len(recipe.sources)} files with {recipe.compiler}, "
        f"about {recipe.seconds:.0f} s; kept in {folder}"
    )


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
def _environment(work: Path) -> Iterator[None]:
    """Where ninja is found, compilers speak English, as what they say is read, and draft in `work`.

    A compiler that is killed leaves its drafts, which go with that folder.
    """
    tempfile.gettempdir()  # Python keeps what it finds first, and that folder will be gone
    settings = {"LC_ALL": "C", "TMPDIR": str(work)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with ninja_on_path():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _toolkit(folder: Path | None) -> Iterator[None]:
    """Where torch takes nvcc and CUDA's headers from, which it settles when it's imported."""
    from torch.utils import cpp_extension

    if folder is None:
        yield
        return
    before = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = str(folder)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


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
                _logger.warning("waiting for %s, which builds the %s kernels", holder, name)
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
