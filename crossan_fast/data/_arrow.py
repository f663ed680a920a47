"""Parquet files and frames (pandas, polars, datasets, pyarrow), by way of pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crossan_fast.data._table import CHUNK, Chunk, Table
from crossan_fast.data.columns import alike, normal

Batches = Callable[[list[str]], Iterator[Any]]


class ArrowTable(Table):
    """Columns that pyarrow reads; `lines` are rows, counted from 1.

    Raises ImportError, naming what to install, without pyarrow; ValueError for two columns of one name, for a
    damaged file and for a column of several types.
    """

    def __init__(self, argument: str, source: str, kind: str, names: Sequence[Any], batches: Batches) -> None:
        self.argument, self.source, self.kind = argument, source, kind
        self._names, self._batches = [str(name) for name in names], batches
        self.header = [normal(name) for name in self._names]
        self.width = len(self._names)
        if wrong := alike(self._names, self.header):
            raise ValueError(f"{self.where}: {wrong}")

    def error(self, line: int, what: str) -> ValueError:
        return ValueError(f"{self.where}, row {line}: {what}")

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        pyarrow = require_pyarrow(self.argument, self.kind)
        names, done = [self._names[place] for place in wanted], 0
        try:
            for batch in self._batches(names):
                columns = [batch.column(name) for name in names]
                plain = [c.combine_chunks() if isinstance(c, pyarrow.ChunkedArray) else c for c in columns]
                yield Chunk(range(done + 1, done + 1 + batch.num_rows), plain)
                done += batch.num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.where}: {' '.join(str(error).split())}") from error


def open_parquet(path: Path, argument: str) -> ArrowTable:
    """A Parquet file, read some rows at a time."""
    pyarrow = require_pyarrow(argument, f"{path}, a Parquet file,")
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{argument}: {path} is no sound Parquet file: {error}") from error
    names = file.schema_arrow.names
    return ArrowTable(
        argument,
        str(path),
        "a Parquet file",
        names,
        lambda wanted: file.iter_batches(batch_size=CHUNK, columns=wanted),
    )


def open_frame(frame: Any, argument: str) -> ArrowTable:
    """A pandas or polars frame, a `datasets.Dataset`, or a pyarrow table.

    Raises:
        TypeError: none of these.
    """
    library = type(frame).__module__.partition(".")[0]
    kind = f"a {library} {type(frame).__name__}"
    pyarrow = require_pyarrow(argument, kind)
    if library == "datasets" and hasattr(frame, "with_format"):
        arrow = frame.with_format("arrow")
        names = frame.column_names
        return ArrowTable(
            argument, kind, kind, names, lambda wanted: arrow.select_columns(wanted).iter(batch_size=CHUNK)
        )
    if library == "pandas" and hasattr(frame, "columns"):
        names = list(frame.columns)

        def from_pandas(wanted: list[str]) -> Iterator[Any]:
            places = [[str(name) for name in names].index(name) for name in wanted]
            for start in range(0, len(frame), CHUNK):
                part = frame.iloc[start : start + CHUNK, places]
                arrays = [pyarrow.array(part.iloc[:, j], from_pandas=True) for j in range(len(places))]
                yield pyarrow.Table.from_arrays(arrays, wanted)

        return ArrowTable(argument, kind, kind, names, from_pandas)
    if library == "polars" and hasattr(frame, "to_arrow"):
        return ArrowTable(
            argument, kind, kind, frame.columns, lambda wanted: iter([frame.select(wanted).to_arrow()])
        )
    if isinstance(frame, pyarrow.Table):
        return ArrowTable(
            argument, kind, kind, frame.column_names, lambda wanted: iter([frame.select(wanted)])
        )
    raise TypeError(
        f"{argument}: expected a path, a pandas or polars DataFrame, a datasets.Dataset or a pyarrow Table, "
        f"got {type(frame).__name__}"
    )


def require_pyarrow(argument: str, what: str) -> Any:
    """The package; ImportError naming `what` needs it where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            f"{argument}: {what} is read by pyarrow, which cannot be imported ({error}); "
            "install it with `pip install 'crossan-fast[formats]'`, or give CSV, TSV or JSON lines"
        ) from error
    return pyarrow
