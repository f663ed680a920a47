"""Where recommendations for many users go: CSV, JSON, JSON lines or Parquet, a batch at a time."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from crossan_fast._files import whole_file
from crossan_fast.data._arrow import require_pyarrow

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Row(NamedTuple):
    """One recommended item."""

    user: str
    rank: int
    item: str
    score: float
    title: str


class Writer(Protocol):
    def __call__(self, rows: Sequence[Row]) -> None:
        """Write the rows of some users, all of a user's at once."""


@contextlib.contextmanager
def open_writer(path: Path | None) -> Iterator[Writer]:
    """A writer for the form that the path's suffix names; CSV to stdout without a path.

    The file appears whole, when the block has ended without an error.

    Raises:
        ValueError: another suffix.
        ImportError: Parquet without pyarrow.
    """
    if path is None:
        yield _csv(sys.stdout, ",")
        return
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out: expected a name that ends with {', '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".parquet":
        require_pyarrow("--out", "a Parquet file")
    with whole_file(path) as draft:
        if path.suffix == ".parquet":
            with _parquet(draft) as write:
                yield write
            return
        with draft.open("w", encoding="utf-8", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                yield _csv(file, "\t" if path.suffix == ".tsv" else ",")
            else:
                with _json(file, array=path.suffix == ".json") as write:
                    yield write


def _csv(file: TextIO, delimiter: str) -> Writer:
    table = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    table.writerow(Row._fields)

    def write(rows: Sequence[Row]) -> None:
        table.writerows((r.user, r.rank, r.item, f"{r.score:.6g}", r.title) for r in rows)

    return write


@contextlib.contextmanager
def _json(file: TextIO, array: bool) -> Iterator[Writer]:
    """An object a user, a line each; with `array` they are the elements of one array."""
    before, between, after = ("[\n", ",\n", "\n]\n") if array else ("", "\n", "\n")
    written = 0

    def write(rows: Sequence[Row]) -> None:
        nonlocal written
        users: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            entry = {"item": row.item, "score": float(f"{row.score:.6g}")}
            users.setdefault(row.user, []).append({**entry, "title": row.title} if row.title else entry)
        for user, items in users.items():
            text = json.dumps({"user": user, "items": items}, ensure_ascii=False)
            file.write((between if written else before) + text)
            written += 1

    yield write
    if written:
        file.write(after)
    elif array:
        file.write("[]\n")


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Writer]:
    import pyarrow
    from pyarrow import parquet

    types = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.float32(), pyarrow.string())
    schema = pyarrow.schema(list(zip(Row._fields, types, strict=True)))
    with parquet.ParquetWriter(path, schema) as file:

        def write(rows: Sequence[Row]) -> None:
            columns = list(zip(*rows, strict=True)) or [()] * len(types)
            file.write_table(pyarrow.table(list(map(list, columns)), schema=schema))

        yield write
