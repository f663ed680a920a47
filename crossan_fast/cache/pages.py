"""Pages of mapped files, brought into memory in the background: rows that come next, or whole files."""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from crossan_fast.cache.tiers import host_memory

# Of the free memory. The system takes pages of files back whenever it needs them, so they may have more of it
# than what is allocated.
_SHARE = 0.75
# Read before rows that were asked for meanwhile have their turn.
_CHUNK_BYTES = 4 << 20


class PageReader:
    """Reads pages of mapped files in a thread of its own.

    Args:
        mapped: tensors `[R, ...]` over mapped files.
        files: theirs, in the same order; each tensor begins where its file does.
    """

    def __init__(self, mapped: Sequence[Tensor], files: Sequence[Path]) -> None:
        rows = [tensor.view(torch.uint8).flatten(1) for tensor in mapped]
        # One byte of each page of a row, and its last: enough to make the system read them all.
        self._marks = [(row[:, :: mmap.PAGESIZE], row[:, -1:]) for row in rows]
        self._bytes = [row.flatten() for row in rows]
        self._widths = [row.shape[1] for row in rows]
        self._files = [os.open(file, os.O_RDONLY) for file in files]
        weakref.finalize(self, _close, self._files)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crossan_fast-pages")
        self._last: deque[Future[None]] = deque(maxlen=2)
        self._all: Future[None] | None = None

    def read(self, ids: Tensor) -> None:
        """Read the pages of rows `ids` soon; forgotten where two calls are still waiting."""
        if not self._have_all and (len(self._last) < 2 or self._last[0].done()):
            self._last.append(self._pool.submit(self._read, ids))

    def request(self, ids: Tensor) -> None:
        """Hand the reads of rows `ids` to the disk, all at once and no byte more, and return.

        A page that is read because a thread needs it keeps that thread waiting, so the disk gets one read at
        a time, each with the pages around it, which are other rows.
        """
        if self._have_all or not hasattr(os, "posix_fadvise"):
            return
        starts = ids.tolist()
        for file, width in zip(self._files, self._widths, strict=True):
            for row in starts:
                os.posix_fadvise(file, row * width, width, os.POSIX_FADV_WILLNEED)

    def read_all(self) -> bool:
        """Begin to read the files whole and in order, at the disk's full speed; rows asked for go first.

        Returns:
            Whether they fit the free memory; where not, nothing is read.
        """
        if self._all is None:
            if sum(raw.numel() for raw in self._bytes) > _SHARE * host_memory():
                return False
            self._all = Future()
            self._pool.submit(self._continue, 0, 0)
        return True

    def wait(self) -> None:
        """Return when all that was taken on is read."""
        for future in (*self._last, *([] if self._all is None else [self._all])):
            future.result()

    @property
    def _have_all(self) -> bool:
        return self._all is not None and self._all.done()

    def _read(self, ids: Tensor) -> None:
        self.request(ids)
        for marks, ends in self._marks:
            marks.index_select(0, ids)
            ends.index_select(0, ids)

    def _continue(self, number: int, start: int) -> None:
        assert self._all is not None
        if number == len(self._bytes):
            self._all.set_result(None)
            return
        raw = self._bytes[number]
        stop = min(start + _CHUNK_BYTES, raw.numel())
        raw[start : stop : mmap.PAGESIZE].amax()
        try:
            self._pool.submit(self._continue, *((number, stop) if stop < raw.numel() else (number + 1, 0)))
        except RuntimeError:  # the interpreter is about to end
            self._all.cancel()


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
