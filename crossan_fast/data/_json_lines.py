"""JSON: an object a line, as Amazon Reviews 2023 and many logs have it, or one array of objects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from crossan_fast._untrusted import once_each
from crossan_fast.data._table import CHUNK, Chunk, Table
from crossan_fast.data.columns import alike, normal


class JsonLines(Table):
    """Objects as rows; the columns are the keys of all of them, in order of first appearance.

    Raises ValueError for two keys of one name, also in different objects, and naming the line for what is no
    JSON object or has a key twice.
    """

    def __init__(self, text: str, argument: str, source: str) -> None:
        self.argument, self.source = argument, source
        self._text = text
        self._array = text.lstrip().startswith("[")
        self.kind = "a JSON array" if self._array else "JSON lines"
        keys: dict[str, None] = {}
        for _, row in self._rows():
            keys.update(dict.fromkeys(row))
        self._keys = list(keys)
        self.header = [normal(key) for key in self._keys]
        self.width = len(self._keys)
        if wrong := alike(self._keys, self.header):
            raise ValueError(f"{self.where}: {wrong}")

    @staticmethod
    def fits(text: str) -> bool:
        """Whether a text is of this kind."""
        start = text.lstrip()
        if start[:1] == "[":
            return start[1:].lstrip()[:1] in ("{", "]")
        if start[:1] != "{":
            return False
        try:
            return isinstance(json.loads(start.partition("\n")[0]), dict)
        except (ValueError, RecursionError):
            return False

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        rows, keys = self._rows(), [self._keys[place] for place in wanted]
        while batch := list(islice(rows, CHUNK)):
            yield Chunk([line for line, _ in batch], [[row.get(key) for _, row in batch] for key in keys])

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._array:
            for line, row in enumerate(self._parse(1, self._text), start=1):
                yield line, self._object(line, row)
            return
        for line, text in enumerate(io.StringIO(self._text, newline="\n"), start=1):
            if text.strip():
                yield line, self._object(line, self._parse(line, text))

    def _parse(self, line: int, text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=once_each)
        except (ValueError, RecursionError) as error:
            raise self.error(line, f"not valid JSON ({error})") from error

    def _object(self, line: int, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise self.error(line, f"expected a JSON object, got {str(row)[:60]}")
        return row
