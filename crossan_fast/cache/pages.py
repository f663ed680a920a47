"""Pages of mapped files, brought into memory in the background: rows that come next, or whole files."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from crossan_fast.cache.checked import CheckedRows
from crossan_fast.cache.tiers import MappedFile, host_memory

# Of the free memory. The system takes pages of files back whenever it needs them, so they may have more of it
# than what is allocated.
_SHARE = 0.75
# Read before rows that were asked for meanwhile have their turn.
_CHUNK_BYTES = 4 << 20
# Of a longer request Linux reads the beginning alone: its read-ahead window, 128 kB unless the disk has a
# larger one. A page less, since rows begin inside pages.
_REQUEST_BYTES = (128 << 10) - mmap.PAGESIZE


class PageReader:
    """Reads pages of mapped files in a thread of its own.

    Args:
        files: of `rows` rows each, of one width within a file.
        checked: of the same files in this order: what is read whole is looked at on the way; None: nothing.
    """

    def __init__(self, files: Sequence[MappedFile], rows: int, checked: CheckedRows | None = None) -> None:
        self._files = list(files)
        self._checked = checked
        tables = [file.bytes.view(rows, -1) for file in files]
        # One byte of each page of a row, and its last: enough to make the system read them all.
        self._marks = [(table[:, :: mmap.PAGESIZE], table[:, -1:]) for table in tables]
        self._widths = [table.shape[1] for table in tables]
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crossan_fast-pages")
        self._last: deque[Future[None]] = deque(maxlen=2)
        self._all: Future[None] | None = None

    def _start_if_forked(self) -> None:
        """A fork of the process has no thread that would go on with what was begun."""
        if self._process != os.getpid():
            self._start()

    def read(self, ids: Tensor) -> None:
        """Read the pages of rows `ids` soon; forgotten where two calls are still waiting."""
        self._start_if_forked()
        if not self._have_all and (len(self._last) < 2 or self._last[0].done()):
            self._last.append(self._pool.submit(self._read, ids))

    def request(self, ids: Tensor) -> None:
        """Hand the reads of rows `ids` to the disk, all at once and no byte more, and return.

        A page that is read because a thread needs it keeps that thread waiting, so the disk gets one read at
        a time, each with the pages around it, which are other rows. A hint: a file system that takes none
        loses nothing but time.
        """
        if self._have_all or not hasattr(os, "posix_fadvise"):
            return
        runs = _runs(ids)
        with contextlib.suppress(OSError):
            for file, width in zip(self._files, self._widths, strict=True):
                for first, behind in runs:
                    end = behind * width
                    for start in range(first * width, end, _REQUEST_BYTES):
                        size = min(_REQUEST_BYTES, end - start)
                        os.posix_fadvise(file.descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def read_all(self) -> bool:
        """Begin to read the files whole and in order, at the disk's full speed; rows asked for go first.

        Goes through them again where that was done before: pages may have been taken back since.

        Returns:
            Whether they fit the free memory; where not, nothing is read.
        """
        self._start_if_forked()
        if self._all is None or self._all.done():
            self._all = None
            if sum(file.bytes.numel() for file in self._files) > _SHARE * host_memory():
                return False
            whole: Future[None] = Future()
            self._pool.submit(_read_on, weakref.ref(self), whole, 0, 0)
            self._all = whole
        return True

    def require_whole(self) -> None:
        """Raise CorruptCacheError where a file is shorter than when it was mapped."""
        for file in self._files:
            file.require_whole()

    def wait(self) -> None:
        """Return when all that was taken on is read; raises what went wrong on the way."""
        self._start_if_forked()
        for future in (*self._last, *([] if self._all is None else [self._all])):
            future.result()

    @property
    def _have_all(self) -> bool:
        whole = self._all
        return whole is not None and whole.done() and whole.exception() is None

    def _read(self, ids: Tensor) -> None:
        self.request(ids)
        self.require_whole()
        for marks, ends in self._marks:
            marks.index_select(0, ids)
            ends.index_select(0, ids)


def _read_on(to: weakref.ref[PageReader], whole: Future[None], number: int, start: int) -> None:
    """Read a chunk and queue the next one; not for a reader that nobody has any more."""
    reader = to()
    if reader is None:
        return
    try:
        file = reader._files[number]
        file.require_whole()
        raw = file.bytes
        stop = min(start + _CHUNK_BYTES, raw.numel())
        raw[start : stop : mmap.PAGESIZE].amax()
        if reader._checked is not None:
            reader._checked.look_at_bytes(number, start, stop)
        number, start = (number, stop) if stop < raw.numel() else (number + 1, 0)
        if number < len(reader._files):
            reader._pool.submit(_read_on, to, whole, number, start)
        else:
            if reader._checked is not None:
                reader._checked.finish()
            whole.set_result(None)
    except Exception as error:  # whoever waits gets it; the interpreter's end is one of them
        whole.set_exception(error)


def _runs(ids: Tensor) -> list[tuple[int, int]]:
    """Runs of consecutive rows among `ids` `[n]`: the first row of each and the one behind its last."""
    rows = ids.unique()
    begins = torch.ones(len(rows), dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1] + 1
    return list(zip(rows[begins].tolist(), (rows[begins.roll(-1)] + 1).tolist(), strict=True))
