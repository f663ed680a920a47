"""Whose turn it is to write to a cache's folder, and new folders that take the place of old ones whole.

Beside a folder `cache` there may be, while it is replaced, `.cache.new` (the new one until it is complete;
in the same instant the old one takes this name) and, where the system cannot swap two folders, `.cache.old`.
Both belong to whoever holds the lock of `.cache.new`. A lock ends with its process: what a killed one left is
removed by the next command on `cache`. So are drafts `.cache.TOKEN.tmp`, see `crossan_fast._files`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from crossan_fast._files import (
    HAS_LOCKS,
    is_draft_of,
    locked,
    open_locked,
    remove_abandoned,
    sync_folder,
)
from crossan_fast.cache.format import (
    BUILDING,
    DIGESTS,
    MAX_META_BYTES,
    META,
    PRESENT,
    REPORT,
    CacheError,
    CacheMeta,
    read_meta,
)

_TEXTS = (META, BUILDING, REPORT)
_WHOLE = "|".join(name.removesuffix(".bin") for name in (PRESENT, DIGESTS))
_DATA = re.compile(rf"([A-Za-z0-9_-]+\.(states|scales|basis|centre)|{_WHOLE})(\.\d+)?\.bin")
T = TypeVar("T")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def holds_anything(folder: Path) -> bool:
    """Whether something is in `folder`, but for drafts that a killed process left, or it is no folder."""
    if not folder.is_dir():
        return folder.exists()
    return any(not is_draft_of(_TEXTS, path.name) for path in folder.iterdir())


def remove_leftovers(folder: Path, meta: CacheMeta | None) -> None:
    """Remove what killed processes left in and beside `folder`, which the caller holds `locked`.

    Args:
        meta: of the cache in it: other data files go, and bytes that it does not commit; None: all of them.
    """
    wanted = {meta.file(name): meta.committed(name) for name in meta.segments} if meta else {}
    for path in folder.iterdir():
        if is_draft_of(_TEXTS, path.name) or (_DATA.fullmatch(path.name) and path.name not in wanted):
            path.unlink(missing_ok=True)
    for name, size in wanted.items():
        if (folder / name).stat().st_size > size:  # of an append that did not get to its commit
            os.truncate(folder / name, size)
    _remove_beside(folder)


def reclaim(folder: Path) -> None:
    """`remove_leftovers` of a cache where nobody writes to it and this process may; else nothing.

    A stopped build's files stay: it can go on.
    """
    with contextlib.suppress(OSError, CacheError):
        restore_retired(folder)
        meta = read_meta(folder)
        with locked(folder):
            if (folder / BUILDING).exists() or read_meta(folder) != meta:
                _remove_beside(folder)
            else:
                remove_leftovers(folder, meta)


def _remove_beside(folder: Path) -> None:
    folder = folder.resolve()
    remove_abandoned(folder.parent, (folder.name,))
    fresh, retired = _sibling(folder, "new"), _sibling(folder, "old")
    if fresh.exists() or retired.exists():
        with contextlib.suppress(BlockingIOError), locked(fresh):  # held: somebody is replacing this folder
            shutil.rmtree(retired, ignore_errors=True)
            shutil.rmtree(fresh, ignore_errors=True)


def at_one_moment(folder: Path, use: Callable[[CacheMeta], T]) -> T:
    """`use(meta)` of the cache in `folder`; once more where it was committed to or replaced meanwhile.

    So all files that `use` opens are of one state of the cache. Raises as `read_meta` and `use` do.
    """
    restore_retired(folder)
    while True:
        before = _description(folder)
        try:
            result = use(read_meta(folder))
        except (OSError, CacheError):
            if _description(folder) == before:
                raise
            continue
        if _description(folder) == before:
            return result


def restore_retired(folder: Path) -> None:
    """Put a cache back that a killed process had moved aside to replace it; else do nothing."""
    fresh, retired = _sibling(folder, "new"), _sibling(folder, "old")
    if folder.exists() or not retired.is_dir():
        return
    with contextlib.ExitStack() as stack:
        if HAS_LOCKS:
            with contextlib.suppress(FileNotFoundError):  # waits for one that is alive to finish
                stack.callback(os.close, open_locked(fresh, wait=True))
        if not folder.exists() and retired.is_dir():
            os.rename(retired, folder)


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A sibling folder to write to, which takes the place of `folder` when the block ends without an error.

    Whoever opens `folder` finds the old one or the new one at every moment, and the old one after any error.

    Raises:
        FileExistsError: `folder` has something in it and `overwrite` is off, or it is no cache.
        BlockingIOError: another process is writing to `folder`, or about to replace it.
    """
    folder = Path(folder).resolve()
    restore_retired(folder)
    _check_replaceable(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = _sibling(folder, "new")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(fresh))
            if folder.is_dir():
                stack.enter_context(locked(folder))
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"folder: another process is writing to {folder}") from error
        try:
            _check_replaceable(folder, overwrite)
            remove_abandoned(folder.parent, (folder.name,))
            _empty(fresh)
            shutil.rmtree(_sibling(folder, "old"), ignore_errors=True)
            yield fresh
            _put_in_place(fresh, folder)
            sync_folder(folder.parent)
        finally:  # either the unfinished new one or, swapped, the old one
            shutil.rmtree(fresh, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not holds_anything(folder):
        return
    if not overwrite:
        raise FileExistsError(f"folder: {folder} is not empty; pass overwrite=True to replace a cache")
    if not (folder / META).exists() and not (folder / BUILDING).exists():
        raise FileExistsError(f"folder: {folder} is not a cache; it will not be replaced")


def _put_in_place(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(fresh, folder)
    elif not _swapped(fresh, folder):
        retired = _sibling(folder, "old")
        os.rename(folder, retired)
        try:
            os.rename(fresh, folder)
        except BaseException:
            os.rename(retired, folder)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _description(folder: Path) -> bytes | None:
    try:
        with open(folder / META, "rb") as file:
            return file.read(MAX_META_BYTES + 1)
    except OSError:
        return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sibling(folder: Path, role: str) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.{role}")
