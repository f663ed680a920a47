"""Cells to numbers: names to codes, times, ratings and labels; whatever the table is kept in."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, timezone
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
TimeUnit = Literal["s", "ms", "us", "ns"]

_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
LABELS = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}

_WHOLE = re.compile(r"(-?[0-9]+)\.0+")

Complain = Callable[[int, str], ValueError]
"""Gives the error of the cell at a place of a chunk."""


class Names:
    """Codes 0, 1, … for names, in order of first appearance."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.code: Callable[[Any], int] = _Codes(self.vocabulary).__getitem__
        """The code of one cell, −1 for an empty one."""

    def codes(self, cells: Any, complain: Complain, what: str) -> npt.NDArray[np.int64]:
        """Codes of a chunk's cells; the error of `complain` for an empty cell and for what is no name."""
        if isinstance(cells, list):
            try:
                codes = np.fromiter(map(self.code, cells), np.int64, len(cells))
            except TypeError:
                place = next(i for i, cell in enumerate(cells) if isinstance(cell, (list, dict)))
                raise complain(place, f"expected one {what}'s name, got {cells[place]!r:.60}") from None
            except UnicodeDecodeError:
                place = next(i for i, cell in enumerate(cells) if not is_text(cell))
                raise complain(
                    place, f"expected the {what}'s name in UTF-8, got {cells[place]!r:.60}"
                ) from None
        else:
            if str(cells.type).startswith(("list", "large_list", "struct", "map")):
                raise complain(0, f"expected one {what}'s name, got a {cells.type}")
            if "binary" in str(cells.type):
                return self.codes(as_list(cells), complain, what)
            encoded = cells.dictionary_encode()
            table = np.array([*map(self.code, encoded.dictionary.to_pylist()), -1], dtype=np.int64)
            codes = table[encoded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)]
        if codes.size and codes.min() < 0:
            raise complain(int(codes.argmin()), f"the {what}'s name is empty")
        return codes


class _Codes(dict[Any, int]):
    """Codes by cell, text not yet stripped or numbers; a dict, since every cell of a table is looked up."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def __missing__(self, cell: Any) -> int:
        name = name_of(cell)
        code = self._vocabulary.setdefault(name, len(self._vocabulary)) if name else -1
        self[cell] = code
        return code


def name_of(cell: Any) -> str:
    """A name as text: what tables hold as numbers are names too, and bytes in UTF-8; '' for an empty cell.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    if isinstance(cell, bytes):
        cell = cell.decode()
    if isinstance(cell, str):
        return cell.strip()
    if cell is None or cell != cell:  # None and NaN
        return ""
    if isinstance(cell, float) and cell.is_integer():  # pandas' integers in a column with gaps
        return str(int(cell))
    return str(cell)


def as_number(name: str) -> str:
    """`7` of `7.0`, what `name_of` makes of the number itself; other names as they are.

    Text keeps its names, so that files of before keep their rows: this is for comparing those of two files.
    """
    found = _WHOLE.fullmatch(name)
    return found[1] if found else name


def is_text(cell: Any) -> bool:
    """Whether a cell is no bytes, or bytes that are text."""
    if isinstance(cell, bytes):
        try:
            cell.decode()
        except UnicodeDecodeError:
            return False
    return True


def as_list(cells: Any) -> list[Any]:
    """A chunk's cells as Python values."""
    return cells if isinstance(cells, list) else list(cells.to_pylist())


def parse_numbers(cells: Any, complain: Complain, what: str) -> Numbers:
    """Finite numbers, int64 where all are integers that fit, else float64."""
    if not isinstance(cells, list) and not cells.null_count and str(cells.type) in ("int64", "string"):
        with contextlib.suppress(ValueError):  # of pyarrow's own, where a text is no integer
            return np.asarray(cells.cast("int64"))
    values = as_list(cells)
    if set(map(type, values)) <= {str, int}:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return np.array([int(value) for value in values], dtype=np.int64)
    floats = np.empty(len(values))
    for place, value in enumerate(values):
        try:
            floats[place] = _finite(float(value))
        except (TypeError, ValueError, OverflowError):
            raise complain(place, f"expected a finite number as {what}, got {value!r}") from None
    return floats


def parse_times(cells: Any, complain: Complain) -> tuple[Numbers, TimeUnit | None]:
    """Times in order; nanoseconds since 1970 of what is written as a date, numbers as they are.

    Dates are ISO 8601; one without a zone is UTC.

    Returns:
        int64 or float64 `[n]`, and `ns` for dates; None for numbers.
    """
    if not isinstance(cells, list) and str(cells.type).startswith(("timestamp", "date")):
        cells = cells.to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(np.isnat(cells))
        if bad.size:
            raise complain(int(bad[0]), "the time is empty")
        return cells.astype("datetime64[ns]").astype(np.int64), "ns"
    if not any(isinstance(value, (date, str)) and not _is_number(value) for value in as_list(cells[:1])):
        return parse_numbers(cells, complain, "timestamp"), None
    values = as_list(cells)
    found = np.empty(len(values), dtype=np.int64)
    for place, value in enumerate(values):
        moment = parse_moment(value)
        if moment is None:
            raise complain(
                place,
                f"expected a finite number as timestamp, got {value!r}, which is no ISO 8601 time either",
            )
        found[place] = moment
    return found, "ns"


def parse_moment(value: Any) -> int | None:
    """Nanoseconds since 1970 of an ISO 8601 date or time (UTC where it names no zone); None for no such."""
    if isinstance(value, str):
        text = value.strip()
        try:
            # Python 3.10 knows no Z, and fractions of 3 or 6 digits alone.
            value = datetime.fromisoformat(f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text)
        except ValueError:
            return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    if value.tzinfo is None:
        value = value.replace(tzinfo=timezone.utc)
    passed = value - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return ((passed.days * 86_400 + passed.seconds) * 10**6 + passed.microseconds) * 1000


def tells_the_day(cell: Any) -> bool:
    """Whether a time is more than a time of day: a date, or a number as large as Unix times since 1973."""
    return abs(float(cell)) >= 1e8 if _is_number(cell) else parse_moment(cell) is not None


def unit_of(times: Numbers) -> TimeUnit:
    """The unit of Unix times, by their size: seconds up to the year 5138, and so on by thousands."""
    largest = float(np.abs(times).max(initial=0))
    units: tuple[TimeUnit, ...] = ("s", "ms", "us")
    return next((unit for unit in units if largest < 1e11 * _PER_SECOND[unit]), "ns")


def of_other_units(times: Numbers, unit: TimeUnit) -> dict[TimeUnit, int]:
    """How many of Unix times in `unit` are likely in one of fewer a second, in which they are since 1973."""
    sizes = np.abs(times.astype(np.float64))
    smaller = [other for other in _PER_SECOND if _PER_SECOND[other] < _PER_SECOND[unit]]
    counts = {
        other: int(((sizes >= 1e8 * _PER_SECOND[other]) & (sizes < 1e11 * _PER_SECOND[other])).sum())
        for other in smaller
    }
    return {other: count for other, count in counts.items() if count}


def cut_in(unit: TimeUnit, moment: int) -> float | int:
    """A moment in nanoseconds as a time of another unit; exact where it is whole."""
    step = _PER_SECOND["ns"] // _PER_SECOND[unit]
    return moment // step if moment % step == 0 else moment / step


def parse_labels(cells: Any, complain: Complain) -> npt.NDArray[np.int8]:
    """0 for training, 1 for validation, 2 for testing, from numbers or words."""
    values = as_list(cells)
    found = np.empty(len(values), dtype=np.int8)
    for place, value in enumerate(values):
        text = str(value).strip().lower()
        label = LABELS.get(text, {"0": 0, "1": 1, "2": 2}.get(text.removesuffix(".0")))
        if label is None:
            raise complain(place, f"expected a split 0, 1, 2 or train, validation, test, got {value!r}")
        found[place] = label
    return found


def parse_sequence(cell: Any) -> Sequence[Any]:
    """The names in one cell: a list, or text with spaces between them; some may be empty."""
    if isinstance(cell, bytes) and is_text(cell):
        cell = cell.decode()
    if isinstance(cell, str):
        return cell.split(" ")
    return [] if cell is None else list(cell) if isinstance(cell, (list, tuple)) else [cell]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError("not finite")
    return float(value)
