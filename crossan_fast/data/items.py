r"""Items files: one line an item, its name first, then what encoders read.

Four layouts are told apart by their first line. IISAN's, tab-separated with no header and no quoting:

    B005FU5HFI<TAB>Manometer 11 Unit of Pressure - Meters &amp; Gauges
    B000QZ1LZM<TAB>MDF Acoustica Deluxe Lightweight Dual Head Stethoscope

MicroLens', comma-separated (RFC 4180 quoting) with a header, or the same without its header:

    id,title
    1,"Snow, at last"

Any table with a header that names the item's column (`item`, `item_id` or `id`), tab- or comma-separated.
Columns may come in any order and be any number; paths are relative to the items file's own folder:

    item<TAB>title<TAB>image_path<TAB>video_path<TAB>audio_path
    lamp<TAB>A brass lamp<TAB>images/lamp.png<TAB>clips/lamp.npy<TAB>

An empty cell means that the item lacks this modality. Titles are HTML-unescaped (`&amp;` becomes `&`).
"""

from __future__ import annotations

import html
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from crossan_fast.data._tables import Table

ITEM_COLUMNS = ("item", "item_id", "id", "itemid")


@dataclass
class ItemTable:
    """Items in file order: `names[i]` has `columns[c][i]`, None where the cell is empty.

    `folder` is what relative paths in the cells start from. Note that `i` counts from 0 here: a catalogue row
    of `Interactions` or of a cache counts from 1 and may leave items out; names connect the two.
    """

    names: list[str]
    columns: dict[str, list[str | None]]
    folder: Path = field(default_factory=Path)

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


def read_items(path: str | os.PathLike[str], *, strict: bool = False) -> ItemTable:
    """Read an items file in any of the layouts above.

    A line that repeats an earlier one whole is dropped with a counted warning, or is an error with `strict`.
    The same item with other contents is always an error, since either line could be the right one.

    Raises FileNotFoundError; ValueError naming the line for bytes that are not UTF-8, a wrong number of
    columns, an empty item name and a repeated item; ValueError for a file with no items and for a header
    without an item column.
    """
    table = Table(path, "items", ITEM_COLUMNS)
    if table.header is None:
        if table.width != 2:
            raise ValueError(
                f"items: {table.path}: without a header expected 2 columns (item, title), got {table.width}; "
                f"with more, the first line names them and one of them is {ITEM_COLUMNS[0]!r}"
            )
        header, key = ["item", "title"], 0
    else:
        header, key = table.header, table.column(ITEM_COLUMNS) or 0

    rows: dict[str, list[str | None]] = {}
    first_line: dict[str, int] = {}
    repeated = 0
    for line, raw in table.rows():
        cells = [_clean(column, cell) for column, cell in zip(header, raw, strict=True)]
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
        raise ValueError(f"items: {table.path} has a header but no items")
    if repeated:
        warnings.warn(f"items: {table.path}: {repeated} repeated lines dropped", stacklevel=2)
    columns = {c: [cells[j] for cells in rows.values()] for j, c in enumerate(header) if c and j != key}
    return ItemTable(names=list(rows), columns=columns, folder=table.path.parent)


def _clean(column: str, cell: str) -> str | None:
    text = cell.strip()
    return (html.unescape(text).strip() if column == "title" else text) or None
