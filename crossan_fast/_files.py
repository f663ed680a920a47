"""Files and folders that appear whole or not at all, whenever their writer is killed.

A draft is written beside its place, as `.NAME.TOKEN.tmp`, and renamed. Its writer holds the draft's lock,
which ends with the process, however that ends: a draft that nobody holds was left by a killed process, and
the next writer of that name removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


def write_whole(path: Path, content: bytes | str) -> None:
    """Put `content`, text as UTF-8, at `path`; after any failure what was there before is there still.

    Returns when it would survive a power cut. Folders on the way are made.
    """
    with whole_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to fill, which becomes `path` if the block ends without an error; see `write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), _draft_of(path, lambda draft: draft.touch(exist_ok=False)) as draft:
        yield draft
        put_in_place(draft, path)


@contextlib.contextmanager
def naming(path: Path, note: str = "; what was there is unchanged") -> Iterator[None]:
    """Put `path`, and `note`, into an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(error.errno, f"{error.strerror}{note}", str(path)) from error
        raise


def put_in_place(file: Path, path: Path) -> None:
    """Move a complete file to `path` on the same file system; returns when that would survive a power cut."""
    with file.open("rb+") as opened, naming(path):
        os.fsync(opened.fileno())
    os.replace(file, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path`, so far missing or empty, if the block ends without an error.

    Its files are not synced: thousands would cost more than making what fits here anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft_of(path, Path.mkdir) as draft:
        yield draft
        os.replace(draft, path)


@contextlib.contextmanager
def passing_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to work in, removed at the end; one of a killed process as a draft of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft_of(path, Path.mkdir) as draft:
        yield draft
        _remove(draft)


@contextlib.contextmanager
def locked(folder: Path, name: str = "folder") -> Iterator[None]:
    """Make `folder` and hold it alone for writing; the lock ends with the process, however that ends.

    Where the system or the file system has no locks, nothing is held.

    Args:
        name: of the argument, for messages.

    Raises:
        BlockingIOError: another process is writing to it.
    """
    descriptor = _acquire(folder, name)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(folder: Path, names: Collection[str]) -> None:
    """Remove drafts of the files and folders `names` in `folder` that killed processes left."""
    for entry in list(folder.iterdir()):
        if not is_draft_of(names, entry.name):
            continue
        # Somebody writes it, another has removed it, or there are no locks to tell.
        with contextlib.suppress(OSError):
            lock = open_locked(entry)
            try:
                _remove(entry)
            finally:
                os.close(lock)


def is_draft_of(names: Collection[str], draft: str) -> bool:
    """Whether a file or folder called `draft` is, or was left as, the draft of one of `names`."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", draft)
    return found is not None and found[1] in names


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder, ""):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_locked(path: Path, *, wait: bool = False) -> int:
    """A descriptor of a file or folder that holds its lock; the lock ends with it.

    Raises:
        BlockingIOError: another holds it, and `wait` is off.
        FileNotFoundError: it is not there, or was removed or replaced before its lock was ours.
        OSError: no locks on this system or file system.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks on this system", str(path))
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _draft_of(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    remove_abandoned(path.parent, (path.name,))
    draft, lock = _begin(path, make)
    try:
        yield draft
    except BaseException:
        _remove(draft)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _begin(path: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """A new draft of `path` and, where there are locks, the descriptor that holds its own."""
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        make(draft)
        try:
            return draft, open_locked(draft, wait=True)
        except FileNotFoundError:  # another writer took it for abandoned before its lock was ours
            continue
        except OSError:  # without locks nobody removes it either
            return draft, None


def _acquire(folder: Path, name: str) -> int | None:
    """A descriptor of `folder`, made where missing, that holds its lock; None where there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return open_locked(folder)
        except FileNotFoundError:  # replaced or removed before its lock was ours
            continue
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"{name}: another process is writing to {folder}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.unlink(missing_ok=True)
