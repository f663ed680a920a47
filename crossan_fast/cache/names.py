"""Item names of a cache's rows, read from its folder on first use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from crossan_fast._checks import nearest
from crossan_fast.cache.contents import names_in, placed, require_segment
from crossan_fast.cache.format import Segment

_COMPARED = 50_000


class ItemNames(Sequence[str]):
    """Names of rows 1..I, in order.

    Args:
        source: the names of rows 1..I, or the file where they stand, one a line,
        segments: with these checksums (None: whatever they are),
        size: in so many bytes.
    """

    def __init__(
        self,
        num_items: int,
        source: Sequence[str] | Path,
        segments: Sequence[Segment] | None = None,
        size: int = 0,
    ) -> None:
        self._num_items, self._segments, self._size = num_items, segments, size
        if not isinstance(source, Path):
            self.by_row = ["", *source]
            return
        # Of this file, whatever its path leads to when the names are asked for.
        self._file = source.absolute()
        self._descriptor = os.open(source, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def require_sound(self) -> None:
        """Compare the file with its checksums; CorruptCacheError where it is not what was written."""
        for start, segment in placed(self._segments or ()):
            require_segment(self._descriptor, start, segment, self._file)

    @cached_property
    def by_row(self) -> Sequence[str]:
        """Row -> name, '' for row 0."""
        self.require_sound()
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read(self._size)
        return ["", *names_in(content, self._num_items, self._file)]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.by_row) if row}

    def row_of(self, name: str) -> int:
        """See `HiddenStateCache.row_of`."""
        row = self._rows.get(name)
        if row is None:
            # Comparing a name with millions takes minutes; those with the same beginning are the likely ones.
            known: Iterable[str] = self._rows
            if self._num_items > _COMPARED:
                known = (other for other in self._rows if other[:3] == str(name)[:3])
            raise KeyError(
                f"name: no item {name!r} among the cache's {self._num_items}{nearest(str(name), known)}"
            )
        return row

    def rows_of(self, names: Sequence[str]) -> list[int]:
        """See `HiddenStateCache.rows_of`."""
        if isinstance(names, str | bytes):  # its letters may be names
            raise TypeError(f"names: expected a list of item names, got {names!r}")
        return [self.row_of(name) for name in names]

    def __reduce__(self) -> tuple[Any, ...]:
        return ItemNames, (self._num_items, list(self.by_row[1:]))

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: Any) -> Any:
        return self.by_row[1:][index] if isinstance(index, slice) else self.by_row[index + 1]
