"""Files of items' names, as `recommend --allow` and `--deny` take them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from crossan_fast.data._open import _read_text, open_table
from crossan_fast.data._values import as_list, name_of
from crossan_fast.data.columns import NAMES, Columns


def names_in(files: Iterable[Path], option: str, known: Collection[str]) -> list[str]:
    """The names of all files: of each a name a line, or of a table with a header its column of items.

    Args:
        option: for messages.
        known: the cache's names. A line that is one of them is that name, whatever else it looks like.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of several columns without a header, or a table without a column of items.
    """
    return [name for path in files for name in _names(path, option, known)]


def _names(path: Path, option: str, known: Collection[str]) -> list[str]:
    table = open_table(path, option, set(NAMES["item"]))
    if table.header is None or (table.width == 1 and _first_line(path, option) in known):
        return list(_lines(path, option, known))
    place = Columns(None, ()).find(table.header, "item", table.where)
    if place is None and table.width > 1:
        raise ValueError(f"{table.where}: expected a column of items, got {', '.join(table.header)}")
    chunks = table.chunks([place or 0])
    names = [name for chunk in chunks for cell in as_list(chunk.cells[0]) if (name := name_of(cell))]
    if not names:
        header = ", ".join(table.header)
        print(f"note: {table.where}: no names, its only line {header} is taken for a header", file=sys.stderr)
    return names


def _first_line(path: Path, option: str) -> str:
    """Of a text without its blank lines; '' of a Parquet file."""
    table = open_table(path, option, ())
    return "" if table.header is not None else _read_text(path, option).strip().split("\n")[0].strip()


def _lines(path: Path, option: str, known: Collection[str]) -> Iterator[str]:
    for number, text in enumerate(io.StringIO(_read_text(path, option), newline="\n"), start=1):
        line = text.strip()
        if not line or line in known:
            yield from filter(None, [line])
            continue
        if "\t" in line:
            cells = line.split("\t")
        else:
            cells = next(csv.reader([line], delimiter=";" if line.count(";") > line.count(",") else ","))
        if len(cells) > 1:
            raise ValueError(
                f"{option}: {path}, line {number}: expected one item's name a line, got {line!r:.80}, which "
                f"is {len(cells)} columns and no item of the cache; a table needs a header that names its "
                "column of items"
            )
        yield cells[0].strip()
