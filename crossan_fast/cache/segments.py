"""Bytes of mapped files compared with their checksums before their first use, a segment at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from torch import Tensor

from crossan_fast.cache.contents import placed, require_segment
from crossan_fast.cache.format import Segment
from crossan_fast.cache.tiers import MappedFile

Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class CheckedSegments:
    """Which segments of a file are known to hold what was written; raises for one that does not.

    Threads may ask at once: at worst two of them read the same segment.

    Args:
        file: that is mapped; the bytes are read through its descriptor.
        segments: of it.
        rows: in it, all of one size.
    """

    def __init__(self, file: MappedFile, segments: Sequence[Segment], rows: int) -> None:
        self._file, self._row_bytes = file, file.size // rows
        self._placed = list(placed(segments))
        # Where the segments begin, and where the last one ends.
        self._bounds = np.array([start for start, _ in self._placed] + [file.size])
        self._sound = np.zeros(len(self._placed), np.bool_)

    def look_rows(self, rows: Tensor) -> None:
        """Read the segments of `rows` `[n]` that nobody has read yet.

        Raises:
            CorruptCacheError: one differs from what was written, or the file is shorter by now.
        """
        begins = np.unique(rows.numpy()).astype(np.int64) * self._row_bytes
        first, last = self._of(begins), self._of(begins + self._row_bytes - 1)
        steps = np.zeros(len(self._placed) + 1, np.int64)
        np.add.at(steps, first, 1)
        np.add.at(steps, last + 1, -1)
        self._look(steps[:-1].cumsum() > 0)

    def look(self, start: int, stop: int, *, alone: bool = False) -> None:
        """As `look_rows`, of bytes [start, stop); `alone`: in this thread, beside others that compute."""
        wanted = np.zeros(len(self._placed), np.bool_)
        if stop > start:
            first, last = self._of(np.array([start, stop - 1]))
            wanted[first : last + 1] = True
        self._look(wanted, alone)

    def _of(self, places: Places) -> Places:
        """The segment of each byte."""
        return np.searchsorted(self._bounds, places, side="right") - 1

    def _look(self, wanted: Flags, alone: bool = False) -> None:
        numbers = np.flatnonzero(wanted & ~self._sound).tolist()
        if alone or len(numbers) < 2:
            for number in numbers:
                self._require(number)
        else:
            with ThreadPoolExecutor() as pool:  # hashing large blocks releases the interpreter's lock
                list(pool.map(self._require, numbers))

    def _require(self, number: int) -> None:
        start, segment = self._placed[number]
        rows = f" (rows {start // self._row_bytes} to {(start + segment.size - 1) // self._row_bytes})"
        require_segment(self._file.descriptor, start, segment, self._file.path, rows)
        self._sound[number] = True
