"""Delimited text files, read as rows with line numbers so that every complaint can name its line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path

_UNPACK = "unpack it first"
_EXPORT = "convert it, e.g. with pandas' `{}` and then `.to_csv(..., index=False)`"
_BINARY = (
    (b"PAR1", "a Parquet file", _EXPORT.format("read_parquet")),
    (b"ARROW1", "an Arrow file", _EXPORT.format("read_feather")),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", f"{_UNPACK}, or save the sheet as CSV UTF-8"),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"\xff\xfe", "in UTF-16", "convert it, e.g. with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "in UTF-16", "convert it, e.g. with `iconv -f UTF-16 -t UTF-8`"),
)


class Table:
    """One delimited file: a `header` where its first line is one, and `rows()` with their line numbers.

    Tab-separated where the first line holds a tab, comma-separated otherwise. Tabs separate plainly, with no
    quoting (titles hold inches: `1/4" NPT`); commas follow RFC 4180. The first line is a header if one of its
    cells is in `key_names`; its cells are compared and kept in lower case, with `_` for spaces and hyphens
    between words (`Image path` is `image_path`). Blank lines are passed over.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for an empty file, for bytes that are not
    UTF-8, for two columns of one name and for a row of another width than the first, each naming `argument`,
    the path and where there is one the line.
    """

    def __init__(self, path: str | os.PathLike[str], argument: str, key_names: Collection[str]) -> None:
        self.path = Path(path)
        self.argument = argument
        self._text = _read_text(self.path, argument)
        first_line = next((line for line in io.StringIO(self._text, newline=None) if line.strip()), "")
        self.delimiter = "\t" if "\t" in first_line else ","
        line, cells = next(self._cells())
        names = ["_".join(cell.lower().replace("-", " ").split()) for cell in cells]
        is_header = any(name in key_names for name in names)
        if is_header and (twice := next((name for name in names if name and names.count(name) > 1), None)):
            raise self.error(line, f"expected different column names, got {twice!r} twice")
        self.header: list[str] | None = names if is_header else None
        self._header_line = line if is_header else 0
        self.width = len(cells)

    @property
    def separator(self) -> str:
        return "tab" if self.delimiter == "\t" else "comma"

    def column(self, names: Collection[str]) -> int | None:
        """Place of the first header cell that is one of `names`."""
        return next((i for i, cell in enumerate(self.header or ()) if cell in names), None)

    def error(self, line: int, what: str) -> ValueError:
        return ValueError(f"{self.argument}: {self.path}, line {line}: {what}")

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row after the header as `(line number from 1, cells)`."""
        for line, cells in self._cells():
            if line == self._header_line:
                continue
            if len(cells) != self.width:
                raise self.error(
                    line, f"expected {self.width} {self.separator}-separated columns, got {len(cells)}"
                )
            yield line, cells

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        if self.delimiter == "\t":
            # Only "\n" ends a line: a title may hold the other characters that str.splitlines breaks at.
            for number, text in enumerate(io.StringIO(self._text, newline="\n"), start=1):
                if text.strip():
                    yield number, text.rstrip("\r\n").split("\t")
            return
        reader = csv.reader(io.StringIO(self._text, newline=""), strict=True)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise self.error(reader.line_num, f"not valid CSV ({error})") from error
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells


def _read_text(path: Path, argument: str) -> str:
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: expected a file, {path} is a folder")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    for magic, kind, advice in _BINARY:
        if data.startswith(magic):
            raise ValueError(
                f"{argument}: {path} is {kind}; expected tab- or comma-separated text in UTF-8 ({advice})"
            )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{argument}: {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            "expected a file in UTF-8 (convert it, e.g. with `iconv -t UTF-8`)"
        ) from error
    if not text.strip():
        raise ValueError(f"{argument}: {path} is empty")
    return text
