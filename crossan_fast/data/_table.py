"""What every reader of tables gives, whatever the table is kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Rows at once: a few megabytes of text, so that a log of any length takes the room of its numbers.
CHUNK = 1 << 16


class Chunk(NamedTuple):
    """Some rows of some columns.

    Attributes:
        lines: numbers of the rows, for messages.
        cells: by column; a list of Python values, or an array of pyarrow.
    """

    lines: Sequence[int]
    cells: list[Any]


class Table(ABC):
    """Rows of named or numbered columns.

    Attributes:
        argument: which argument of the caller it is, for messages.
        source: its path, or what else it is.
        kind: what it was taken for.
        header: names of its columns, normalised; None where it has none.
        first: the first line's cells, normalised, header or not; none of what has column names anyway.
        types: RecBole's, by column; None where it has none.
        width: how many columns.
    """

    argument: str
    source: str
    kind: str
    header: list[str] | None
    first: Sequence[str] = ()
    types: list[str] | None = None
    width: int

    @property
    def where(self) -> str:
        return f"{self.argument}: {self.source}"

    def error(self, line: int, what: str) -> ValueError:
        return ValueError(f"{self.where}, line {line}: {what}")

    @abstractmethod
    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """The columns at places `wanted`, in file order."""
