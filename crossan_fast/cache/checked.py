"""Rows of mapped files are looked at before their first use: damage in one spoils every weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossan_fast.cache.segments import CheckedSegments
from crossan_fast.cache.tiers import MappedFile
from crossan_fast.cache.validate import all_finite_alone, reject_nonfinite
from crossan_fast.config import Modality

_CHUNK_BYTES = 4 << 20
# Of a file that is read whole, compared at once with its checksums, by as many threads as there are cores.
_AHEAD_BYTES = 32 << 20


class CheckedRows:
    """Which rows of a cache's files are known to be what was written and finite; raises for one that is not.

    A row is read for this once in the life of an opened cache; afterwards asking for it is a look at one
    byte, and at the sizes of the files. Threads may ask at once: at worst two of them look at the same row.

    Args:
        modalities: of the cache.
        states: `[I + 1, L, D_m]` for each of them.
        scales: fp32 `[I + 1, L]` for each of them, for int8 and fp8 states alone.
        names: of rows 1..I, for messages; read only for them.
        folder: where the files are, for messages; None for tensors, of which `finish` is told at once.
        files: mapped by `states` and `scales`, in this order.
        segments: of the same files; none where nothing is to be compared with checksums.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        states: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        names: Sequence[str],
        folder: Path | None,
        files: Sequence[MappedFile] = (),
        segments: Sequence[CheckedSegments] = (),
    ) -> None:
        kinds = [("states", states), ("scales", scales or ())]
        self._tables = [
            (what, modality.name, table)
            for what, tables in kinds
            for modality, table in zip(modalities, tables, strict=False)
        ]
        self._names, self._files, self._segments = names, files, segments
        self._advice = (
            f"; `crossan-fast cache verify {folder}` says whether the file was damaged after it was written"
        )
        self._sound = torch.zeros(len(states[0]), dtype=torch.bool)
        self._all = False

    def look(self, ids: Tensor | None) -> None:
        """Look at the rows `ids` `[n]` (None: all) that nobody has looked at yet.

        Does nothing where `torch.compile` traces.

        Raises:
            CorruptCacheError: one is not what was written, or a file is shorter than when it was opened.
            ValueError: NaN or inf in one, with its modality, item, row and level.
        """
        if torch.compiler.is_compiling():
            return
        for file in self._files:
            file.require_whole()
        if self._all:
            return
        if ids is None:
            for number, (_, _, table) in enumerate(self._tables):
                for start in range(0, len(table), step := rows_at_once(table)):
                    self.look_at(number, start, table[start : start + step])
            self.finish()
            return
        ids = ids.cpu()
        known = self._sound.index_select(0, ids)
        if bool(known.all()):
            return
        fresh = ids[~known]
        for segments in self._segments:
            segments.look_rows(fresh)
        for what, name, table in self._tables:
            raw = table.view(torch.uint8) if table.element_size() == 1 else table  # no gather of fp8
            for rows in fresh.split(rows_at_once(table)):
                block = raw.index_select(0, rows).view(table.dtype)
                reject_nonfinite(block, name, self._names, what=what, advice=self._advice, rows=rows)
        self._sound[fresh] = True

    def look_at(self, number: int, first_row: int, block: Tensor) -> None:
        """Look at `block`, a file's rows from `first_row` on; files are numbered as they were given.

        Whoever has had every row of every file looked at so calls `finish`.
        """
        if self._all:
            return
        what, name, table = self._tables[number]
        width = table[0].numel() * table.element_size()
        start, stop = first_row * width, (first_row + len(block)) * width
        whole = _AHEAD_BYTES * -(-stop // _AHEAD_BYTES)
        self._compare(number, start, min(whole, len(table) * width))
        reject_nonfinite(block, name, self._names, first_row, what=what, advice=self._advice)

    def look_at_bytes(self, number: int, start: int, stop: int) -> None:
        """As `look_at`, of whole elements in bytes `start` to `stop` of a file, wherever its rows begin.

        For a thread beside a training step; see `all_finite_alone`.
        """
        if self._all:
            return
        self._compare(number, start, stop, alone=True)
        table = self._tables[number][2]
        size = table.element_size()
        if all_finite_alone(table.view(-1)[start // size : stop // size]):
            return
        width = table[0].numel() * size
        first = start // width
        self.look_at(number, first, table[first : -(-stop // width)])

    def _compare(self, number: int, start: int, stop: int, alone: bool = False) -> None:
        if self._files:
            self._files[number].require_whole()
        if self._segments:
            self._segments[number].look(start, stop, alone=alone)

    def finish(self) -> None:
        """Every row has been looked at."""
        self._all = True

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose tables are in memory: what is in the files is looked at before it is copied."""
        self.look(None)
        return {**self.__dict__, "_files": (), "_segments": ()}


def rows_at_once(table: Tensor) -> int:
    """How many rows of `table` are a chunk to look at."""
    return max(1, _CHUNK_BYTES // max(1, table[0].numel() * table.element_size()))
