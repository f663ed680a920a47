r"""Items files: one line an item, its name first, then what encoders read.

A source is a file, which may be gzipped, or a frame of pandas or polars, a `datasets.Dataset` or a pyarrow
table; what it holds is told by its first bytes and its first line. IISAN's, tab-separated with no header and
no quoting:

    B005FU5HFI<TAB>Manometer 11 Unit of Pressure - Meters &amp; Gauges
    B000QZ1LZM<TAB>MDF Acoustica Deluxe Lightweight Dual Head Stethoscope

MicroLens', comma-separated (RFC 4180 quoting) with a header, or the same without its header:

    id,title
    1,"Snow, at last"

Any table that names the item's column (`item`, `item_id`, `parent_asin`, `id`, …): tabs or commas with a
header, RecBole's `.item`, JSON lines (Amazon Reviews 2023's metadata), Parquet, a frame. Columns may come in
any order and be any number; paths are relative to the items file's own folder:

    item<TAB>title<TAB>image_path<TAB>video_path<TAB>audio_path
    lamp<TAB>A brass lamp<TAB>images/lamp.png<TAB>clips/lamp.npy<TAB>

An empty cell means that the item lacks this modality. Titles are HTML-unescaped (`&amp;` becomes `&`), lists
of texts joined by spaces.
"""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossan_fast.data._open import Source, open_table
from crossan_fast.data._table import Table
from crossan_fast.data._values import as_list, is_text, name_of
from crossan_fast.data.columns import ITEMS_ROLES, Columns


@dataclass
class ItemTable:
    """Items in file order: `names[i]` has `columns[c][i]`, None where the cell is empty.

    `folder` is what relative paths in the cells start from. Note that `i` counts from 0 here: a catalogue row
    of `Interactions` or of a cache counts from 1 and may leave items out; names connect the two. `taken_for`
    says what the source was.
    """

    names: list[str]
    columns: dict[str, list[str | None]]
    folder: Path = field(default_factory=Path)
    taken_for: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self._index) != len(self.names):
            repeated = next(name for i, name in enumerate(self.names) if self._index[name] != i)
            raise ValueError(f"names: item {repeated!r} occurs more than once")
        for column, cells in self.columns.items():
            if len(cells) != len(self.names):
                raise ValueError(
                    f"columns[{column!r}]: expected {len(self.names)} cells, one an item, got {len(cells)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, name: str) -> int:
        """Place of an item in `names`; KeyError naming it where it is not there."""
        try:
            return self._index[name]
        except KeyError:
            raise KeyError(f"name: {name!r} is none of the {len(self)} items") from None

    def title_of(self, name: str) -> str | None:
        """Title of an item, None where it has none; KeyError for an unknown name."""
        index = self.index_of(name)
        return self.columns["title"][index] if "title" in self.columns else None

    def paths(self, column: str) -> list[Path | None]:
        """The files that `column` names, one an item, relative ones from `folder`."""
        if column not in self.columns:
            raise KeyError(f"column: {column!r} is not among {sorted(self.columns)}")
        return [None if cell is None else self.folder / cell for cell in self.columns[column]]


def read_items(
    source: Source, *, strict: bool = False, columns: Mapping[str, str | int] | None = None
) -> ItemTable:
    """Read an items file or frame in any of the layouts above.

    A line that repeats an earlier one whole is dropped with a counted warning, or is an error with `strict`.
    The same item with other contents is always an error, since either line could be the right one. `columns`
    says which column is the `item` and which the `title` where their names are none of the usual ones.

    Raises FileNotFoundError; ImportError for Parquet and frames without pyarrow; ValueError naming the line
    for bytes that are not UTF-8, a wrong number of columns, an empty item name and a repeated item;
    ValueError for a file with no items and for a header without an item column.
    """
    wishes = Columns(columns, ITEMS_ROLES)
    table = open_table(source, "items", wishes.keys("item"))
    header, key = _header(table, wishes)
    rows: dict[str, list[str | None]] = {}
    first_line: dict[str, int] = {}
    repeated = 0
    no_text: dict[str, None] = {}
    for chunk in table.chunks(range(table.width)):
        for line, *raw in zip(chunk.lines, *map(as_list, chunk.cells), strict=True):
            if not is_text(raw[key]):
                raise table.error(line, f"expected the item's name in UTF-8, got {raw[key]!r:.60}")
            no_text.update((c, None) for c, cell in zip(header, raw, strict=True) if not is_text(cell))
            cells = [None if c in no_text else _clean(c, cell) for c, cell in zip(header, raw, strict=True)]
            name = cells[key]
            if name is None:
                raise table.error(line, "the item's name is empty")
            if name not in rows:
                rows[name], first_line[name] = cells, line
            elif strict or rows[name] != cells:
                raise table.error(line, f"item {name!r} is already on line {first_line[name]}")
            else:
                repeated += 1
    if not rows:
        raise ValueError(f"{table.where} has a header but no items")
    if repeated:
        warnings.warn(f"{table.where}: {repeated} repeated lines dropped", stacklevel=2)
    if no_text:
        warnings.warn(
            f"{table.where}: left out {', '.join(no_text)}: bytes that are no text in UTF-8", stacklevel=2
        )
    kept = {
        c: [cells[j] for cells in rows.values()]
        for j, c in enumerate(header)
        if c and j != key and c not in no_text
    }
    folder = Path(source).parent if isinstance(source, (str, os.PathLike)) else Path()
    read = f"item {header[key]!r}, " if table.header else ""
    taken_for = f"{table.source}: taken for {table.kind} ({read}others {', '.join(kept)})"
    return ItemTable(list(rows), kept, folder, taken_for)


def _header(table: Table, columns: Columns) -> tuple[list[str], int]:
    """Names of the columns, `title` by that name whatever it is called, and the place of the items' names."""
    if table.header is None:
        if lacking := columns.lacking(table.first):
            raise ValueError(f"{table.where}: {lacking}")
        if columns.by_place:
            header = [f"column_{place}" for place in range(1, table.width + 1)]
            key, title = (columns.place(r, table.width, table.where, table.first) for r in ITEMS_ROLES)
        elif table.width == 2:
            header, key, title = ["item", "title"], 0, None
        else:
            raise ValueError(
                f"{table.where}: without a header expected 2 columns (item, title), got {table.width}; "
                "with more, the first line names them and one of them is 'item', or columns={'item': NAME} "
                "(--item-column NAME) says which it is"
            )
    else:
        header = list(table.header)
        key, title = (columns.find(header, role, table.where) for role in ITEMS_ROLES)
    if key is None:
        raise ValueError(
            f"{table.where}: expected a column of items' names, got {', '.join(header)} "
            "(columns={'item': NAME}, --item-column NAME, says which it is)"
        )
    if title is not None and title != key:
        others = ["other_title" if name == "title" else name for name in header]
        header = [*others[:title], "title", *others[title + 1 :]]
    return header, key


def _clean(column: str, cell: Any) -> str | None:
    if not isinstance(cell, str):
        cell = _text(cell)
    text = cell.strip()
    return (html.unescape(text).strip() if column == "title" else text) or None


def _text(cell: Any) -> str:
    """What JSON and frames hold, as text."""
    if isinstance(cell, (list, tuple)) and all(isinstance(part, str) for part in cell):
        return " ".join(cell)
    if isinstance(cell, (list, tuple, dict)):
        return json.dumps(cell, ensure_ascii=False, default=str) if cell else ""
    return name_of(cell)
