"""Sniffing: what a source is, by its first bytes and its first line."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from crossan_fast.data._arrow import open_frame, open_parquet
from crossan_fast.data._delimited import Delimited
from crossan_fast.data._json_lines import JsonLines
from crossan_fast.data._table import Table

Source = str | os.PathLike[str] | Any
"""A path, or a frame of pandas or polars, a `datasets.Dataset`, or a pyarrow table."""

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_UNPACK = "unpack it first"
_BINARY = (
    (b"ARROW1", "an Arrow file", "convert it, e.g. with pandas' `read_feather` and then `.to_parquet(...)`"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", f"{_UNPACK}, or save the sheet as CSV UTF-8"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"\xff\xfe", "in UTF-16", "convert it, e.g. with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "in UTF-16", "convert it, e.g. with `iconv -f UTF-16 -t UTF-8`"),
)


def open_table(source: Source, argument: str, key_names: Collection[str]) -> Table:
    """The table in a file or a frame: delimited text, JSON (either may be gzipped), Parquet, or a frame.

    Args:
        argument: of the caller, for messages.
        key_names: a delimited file's first line is a header if it holds one of these.

    Raises:
        FileNotFoundError, IsADirectoryError: the path leads to no file.
        ValueError: an empty file, one of another format (named, with what to do), or bytes that are not
            UTF-8, with their line.
        ImportError: a Parquet file or a frame without pyarrow.
        TypeError: neither a path nor a frame.
    """
    if not isinstance(source, (str, os.PathLike)):
        return open_frame(source, argument)
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: expected a file, {path} is a folder")
    try:
        with path.open("rb") as file:
            start = file.read(len(_PARQUET))
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    if start == _PARQUET:
        return open_parquet(path, argument)
    text = _read_text(path, argument)
    if JsonLines.fits(text):
        table: Table = JsonLines(text, argument, str(path))
    else:
        table = Delimited(text, argument, str(path), key_names)
    if start.startswith(_GZIP):
        table.kind += ", gzipped"
    return table


def _read_text(path: Path, argument: str) -> str:
    data = path.read_bytes()
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{argument}: {path} is a damaged gzip file ({error})") from error
    for magic, kind, advice in _BINARY:
        if data.startswith(magic):
            raise ValueError(
                f"{argument}: {path} is {kind}; expected text in UTF-8 (tab- or comma-separated, or JSON "
                f"lines) or Parquet ({advice})"
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
