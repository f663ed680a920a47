"""Tables of users to sequences of codes in time order, before anything is left out for being short or old."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from crossan_fast.data._delimited import Delimited
from crossan_fast.data._table import Chunk, Table
from crossan_fast.data._values import (
    Complain,
    Names,
    Numbers,
    TimeUnit,
    as_list,
    is_text,
    of_other_units,
    parse_labels,
    parse_numbers,
    parse_sequence,
    parse_times,
    tells_the_day,
    unit_of,
)
from crossan_fast.data.columns import NAMES, Columns

Ints = npt.NDArray[np.int64]

_BY_ITEM = ("time", "rating", "label")
_NO_TEXT = "expected items' names in UTF-8, got bytes that are not"
_KNOWN = {name for names in NAMES.values() for name in names}
_FORMS = "expected `user<TAB>item item item ...` or a header with the columns user, item, timestamp"
_WHICH = (
    "columns: {user: NAME, item: NAME, time: NAME}, or --user-column NAME and its kin, says which is which"
)


@dataclass
class Raw:
    """Sequences as a source has them: user u's items are `vocabulary[codes[offsets[u]:offsets[u + 1]]]`.

    `times` and `labels` (0 training, 1 validation, 2 testing) go with `codes`; None where there are none.
    """

    user_names: list[str]
    vocabulary: list[str]
    codes: Ints
    offsets: Ints
    times: Numbers | None = None
    unit: TimeUnit | None = None
    labels: npt.NDArray[np.int8] | None = None
    low_ratings: int = 0
    taken_for: str = ""


@dataclass
class _Part:
    """What one table adds."""

    owner: list[Ints] = field(default_factory=list)
    codes: list[Ints] = field(default_factory=list)
    times: list[Numbers] = field(default_factory=list)
    labels: list[npt.NDArray[np.int8]] = field(default_factory=list)


class RawBuilder:
    """Gathers the tables of one population: one, or one for each part of a split that somebody else made.

    Args:
        columns: the caller's wishes.
        min_rating: interactions rated lower are left out and counted.
        labels: read a column of a given split, which then orders before times do.
    """

    def __init__(self, columns: Columns, min_rating: float | None, labels: bool = False) -> None:
        self._columns, self._min_rating, self._labels = columns, min_rating, labels
        self._users, self._items = Names(), Names()
        self._part = _Part()
        self._units: set[TimeUnit | None] = set()
        self._low = 0
        self._said: list[str] = []

    def add_sequences(self, sequences: Mapping[str, Sequence[str]]) -> None:
        """Sequences at hand, oldest first; ValueError for a string in place of one."""
        if not isinstance(sequences, Mapping):
            raise TypeError(f"sequences: expected item names by user, got {type(sequences).__name__}")
        for user, names in sequences.items():
            if isinstance(names, str | bytes):  # its letters would be taken for items
                raise ValueError(f"sequences[{user!r}]: expected a list of item names, got {names!r}")
        users, items = self._users.vocabulary, self._items.vocabulary
        rows = [[items.setdefault(name, len(items)) for name in names] for names in sequences.values()]
        self._extend([users.setdefault(user, len(users)) for user in sequences], rows, None)

    def add(self, table: Table, label: int | None = None) -> None:
        """A table in any of the layouts of `crossan_fast.data.interactions`, as part `label` of a split."""
        roles = self._roles(table)
        if self._min_rating is not None and "rating" not in (roles or {}):
            raise ValueError(f"min_rating: expected a column of ratings in {table.source}, found none")
        if roles is not None and self._min_rating is None:
            roles.pop("rating", None)
        if roles is not None and (label is not None or not self._labels):
            roles.pop("label", None)
        if roles is None:
            self._add_lines(table, {"user": 0, "items": 1}, label)
            said = f"{table.kind}, a user and their items a line"
        elif "item" not in roles:
            roles = self._by_item(table, roles)
            self._add_lines(table, roles, label)
            said = f"{table.kind}, a user and their items a row ({self._named(table, roles)})"
        elif "items" in roles and "time" not in roles:
            if unread := roles.keys() & {"rating", "label"}:
                raise ValueError(
                    f"{table.where}: expected ratings and splits with an interaction a row, got "
                    f"{self._named(table, {role: roles[role] for role in sorted(unread)})} with histories "
                    "and their next item (min_rating and labels cannot tell a history's items apart)"
                )
            self._add_prefixes(table, roles, label)
            said = f"{table.kind}, histories with their next item ({self._named(table, roles)})"
        else:
            roles.pop("items", None)
            self._refuse_time_of_day(table, roles)
            self._refuse_other_order(table, roles)
            self._add_events(table, roles, label)
            order = "" if "time" in roles else ", in file order"
            said = f"{table.kind}, an interaction a row ({self._named(table, roles)}){order}"
        self._said.append(f"{table.source}: taken for {said}")

    def finish(self) -> Raw:
        """Everything by user, in time order; equal times keep file order.

        Raises:
            ValueError: some tables have times or labels and others have not, or times of different kinds.
        """
        part = self._part
        owner, codes = _joined(part.owner), _joined(part.codes)
        times = self._checked(part.times, "times", owner.size)
        labels = self._checked(part.labels, "splits", owner.size)
        if len(self._units) > 1:
            raise ValueError("users: expected times as numbers or as dates, got both")
        keys = [key for key in (times, labels, owner) if key is not None]
        if times is not None or labels is not None or (np.diff(owner) < 0).any():
            order = np.lexsort(keys)  # stable
            owner, codes = owner[order], codes[order]
            times = None if times is None else times[order]
            labels = None if labels is None else labels[order]
        lengths = np.bincount(owner, minlength=len(self._users.vocabulary))
        unit = None if times is None else next(iter(self._units)) or self._unit_of(times)
        return Raw(
            list(self._users.vocabulary),
            list(self._items.vocabulary),
            codes,
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            times,
            unit,
            labels,
            self._low,
            "; ".join(self._said) + (f"; times in {unit}" if unit else ""),
        )

    def _unit_of(self, times: Numbers) -> TimeUnit:
        unit = unit_of(times)
        if others := of_other_units(times, unit):
            counts = " and ".join(f"{count:,} look like {other}" for other, count in others.items())
            sources = ", ".join(said.partition(": taken for")[0] for said in self._said)
            warnings.warn(
                f"users: {sources}: expected times of one unit, got {times.size:,} that are ordered as "
                f"{unit}, of which {counts}: those come first, whenever they were",
                stacklevel=4,
            )
        return unit

    def _roles(self, table: Table) -> dict[str, int] | None:
        """The place of each role's column; None for IISAN's layout, which has no header."""
        columns = self._columns
        if table.header is None:
            if columns.by_place:
                places = {r: columns.place(r, table.width, table.where, table.first) for r in NAMES}
                return self._complete(table, {r: p for r, p in places.items() if p is not None})
            lacking, pairs = columns.lacking(table.first), _is_tabbed(table) and table.width == 2
            # A user's name may resemble a column's, but no header names several items.
            if "did you mean" in lacking and not (pairs and _holds_sequences(table, 1)):
                raise ValueError(f"{table.where}: {lacking}")
            if pairs:
                if lacking:  # columns may be those of another file of a run
                    warnings.warn(f"{table.where}: {lacking}; read without a header", stacklevel=2)
                return None
            text = table.kind.removesuffix(" text")
            raise ValueError(
                f"{table.where}: {_FORMS}; got {table.width} {text} columns without a header that names one "
                f"of {', '.join(sorted(columns.keys('user')))} ({_WHICH}, by name or, without a header, by "
                "number from 1)"
            )
        found = {role: columns.find(table.header, role, table.where) for role in NAMES if role != "title"}
        return self._complete(table, {r: p for r, p in found.items() if p is not None})

    def _complete(self, table: Table, roles: dict[str, int]) -> dict[str, int]:
        header = table.header or [f"column {place}" for place in range(1, table.width + 1)]
        if "user" in roles and table.width == 2 and "items" not in roles:
            other = 1 - roles["user"]
            if ("item" not in roles and _is_tabbed(table)) or _holds_sequences(table, other):
                return {"user": roles["user"], "items": other}
        got = f"got {table.width} columns named {', '.join(header)}"
        if "user" not in roles or not roles.keys() & {"item", "items"}:
            raise ValueError(f"{table.where}: {_FORMS}; {got} ({_WHICH})")
        ordered = roles.keys() & {"time", "items"} or table.header is None or _KNOWN.issuperset(header)
        if not ordered:
            raise ValueError(
                f"{table.where}: {_FORMS}; {got}: none of them is known for times; name it by "
                "columns={'time': ...} (--time-column), or leave the others out where rows are in order"
            )
        return roles

    def _named(self, table: Table, roles: Mapping[str, int]) -> str:
        header = table.header
        shown = {r: f"column {p + 1}" if header is None else repr(header[p]) for r, p in roles.items()}
        return ", ".join(f"{role} {name}" for role, name in shown.items())

    def _refuse_time_of_day(self, table: Table, roles: Mapping[str, int]) -> None:
        """Where a column `date` stands beside the one taken for times, that has to tell the day, too."""
        header, place = table.header or [], roles.get("time")
        if place is None or "date" not in header or header[place] == "date" or self._columns.wished("time"):
            return
        cells = _first_cells(table, place)
        if cells and not any(map(tells_the_day, cells)):
            raise ValueError(
                f"{table.where}: expected Unix times or ISO 8601 times in column {header[place]!r}, since a "
                f"column 'date' stands beside it, got values such as {cells[0]!r}; columns={{'time': NAME}} "
                f"(--time-column NAME) says which counts: 'date', {header[place]!r}, or a column of both"
            )

    def _refuse_other_order(self, table: Table, roles: Mapping[str, int]) -> None:
        """Where a further column of times, of which the caller chose none, contradicts the order of the one
        that is taken. A time of day is no rival of a time."""
        header, place = table.header or [], roles.get("time")
        others = [header.index(name) for name in NAMES["time"] if name in header]
        if place is None or others == [place] or self._columns.wished("time"):
            return
        taken, has_day = _times_in(table, place), any(map(tells_the_day, _first_cells(table, place)))
        if taken is None:
            return
        chunks = table.chunks([roles["user"]])
        owner = _joined([self._users.codes(c.cells[0], _complain(table, c), "user") for c in chunks])
        order = np.lexsort((taken, owner))  # stable, as sequences are sorted
        owner = owner[order]
        for other in others:
            if has_day and not any(map(tells_the_day, _first_cells(table, other))):
                continue
            if (found := _times_in(table, other)) is None:
                continue
            found = found[order]
            back = np.flatnonzero((found[1:] < found[:-1]) & (owner[1:] == owner[:-1]))
            if back.size:
                user = list(self._users.vocabulary)[owner[back[0]]]
                raise ValueError(
                    f"{table.where}: expected one order of times, got one by column {header[place]!r} and "
                    f"another by {header[other]!r}, such as for user {user!r}; columns={{'time': NAME}} "
                    "(--time-column NAME) says which counts"
                )

    def _add_events(self, table: Table, roles: Mapping[str, int], label: int | None) -> None:
        names = [role for role in ("user", "item", "time", "rating", "label") if role in roles]
        for chunk in table.chunks([roles[role] for role in names]):
            cells, complain = dict(zip(names, chunk.cells, strict=True)), _complain(table, chunk)
            user = self._users.codes(cells["user"], complain, "user")
            item = self._items.codes(cells["item"], complain, "item")
            kept = np.ones(len(user), dtype=bool)
            if self._min_rating is not None:
                kept = parse_numbers(cells["rating"], complain, "rating") >= self._min_rating
                self._low += int((~kept).sum())
            if "time" in roles:
                times, unit = parse_times(cells["time"], complain)
                self._part.times.append(times[kept])
                self._units.add(unit)
            if label is not None or "label" in roles:
                given = parse_labels(cells["label"], complain) if label is None else np.full(len(user), label)
                self._part.labels.append(given[kept].astype(np.int8))
            self._part.owner.append(user[kept])
            self._part.codes.append(item[kept])

    def _by_item(self, table: Table, roles: Mapping[str, int]) -> dict[str, int]:
        """The roles without those of a row as a whole: of what goes with items, a list of items has as many.

        The first row of several items decides; what the caller asked for by name or by `min_rating` stays.
        """
        kept = dict(roles)
        for role in _BY_ITEM:
            asked = self._columns.wished(role) or (role == "rating" and self._min_rating is not None)
            if role in roles and not asked:
                rows = (
                    zip(*map(as_list, chunk.cells), strict=True)
                    for chunk in table.chunks([roles["items"], roles[role]])
                )
                counts = (tuple(map(_entries, cells)) for cells in chain.from_iterable(rows))
                if next((of_role for of_items, of_role in counts if of_items > 1), 2) < 2:
                    del kept[role]
        return kept

    def _add_lines(self, table: Table, roles: Mapping[str, int], label: int | None) -> None:
        """A user's whole sequence in one row, with as many times, ratings and labels where it has them."""
        first_line: dict[int, int] = {}
        by_item = [role for role in _BY_ITEM if role in roles]
        for chunk in table.chunks(list(roles.values())):
            complain, cells = _complain(table, chunk), dict(zip(roles, chunk.cells, strict=True))
            owners = self._users.codes(cells["user"], complain, "user").tolist()
            for line, owner in zip(chunk.lines, owners, strict=True):
                if first_line.setdefault(owner, line) != line:
                    name = list(self._users.vocabulary)[owner]
                    raise table.error(
                        line,
                        f"user {name!r} is already on line {first_line[owner]} (where each line is one "
                        "interaction, say which column is which with columns=)",
                    )
            rows = list(map(_names if by_item else parse_sequence, as_list(cells["items"])))
            codes = self._codes_of(rows, complain)
            lengths, kept = [len(row) for row in rows], codes >= 0
            entries = {role: _flat(cells[role], lengths, role, complain) for role in by_item}
            of_item = _complain(table, Chunk(np.repeat(chunk.lines, lengths).tolist(), []))
            if "rating" in entries:
                high = parse_numbers(entries["rating"], of_item, "rating") >= self._min_rating
                self._low += int((kept & ~high).sum())
                kept &= high
            if "time" in entries:
                times, unit = parse_times(entries["time"], of_item)
                self._part.times.append(times[kept])
                self._units.add(unit)
            if "label" in entries:
                self._part.labels.append(parse_labels(entries["label"], of_item)[kept])
            self._append(np.repeat(np.array(owners, dtype=np.int64), lengths)[kept], codes[kept], label)

    def _add_prefixes(self, table: Table, roles: Mapping[str, int], label: int | None) -> None:
        """RecBole's rows of a history and the item behind it: a user's longest row is their sequence.

        Of a validation or test file only the items behind count: their histories are the other files'.
        """
        longest: dict[int, list[int]] = {}
        for chunk in table.chunks([roles["user"], roles["items"], roles["item"]]):
            complain = _complain(table, chunk)
            owners = self._users.codes(chunk.cells[0], complain, "user").tolist()
            targets = self._items.codes(chunk.cells[2], complain, "item").tolist()
            if label:
                self._extend(owners, [[target] for target in targets], label)
                continue
            rows = zip(chunk.lines, owners, as_list(chunk.cells[1]), targets, strict=True)
            for line, owner, cell, target in rows:
                try:
                    row = [code for code in map(self._items.code, parse_sequence(cell)) if code >= 0]
                except UnicodeDecodeError:
                    raise table.error(line, _NO_TEXT) from None
                if len(row) >= len(longest.get(owner, ())):
                    longest[owner] = [*row, target]
        self._extend(list(longest), list(longest.values()), label)

    def _codes_of(self, rows: Sequence[Sequence[Any]], complain: Complain) -> Ints:
        """Codes of all rows' items, one behind the other; −1 for an empty name."""
        try:
            return np.fromiter(map(self._items.code, chain.from_iterable(rows)), dtype=np.int64)
        except UnicodeDecodeError:
            place = next(i for i, row in enumerate(rows) if not all(map(is_text, row)))
            raise complain(place, _NO_TEXT) from None

    def _extend(self, owners: Sequence[int], rows: Sequence[Sequence[int]], label: int | None) -> None:
        """`rows[i]` for `owners[i]`."""
        owner = np.repeat(np.array(owners, dtype=np.int64), [len(row) for row in rows])
        self._append(owner, np.fromiter(chain.from_iterable(rows), dtype=np.int64), label)

    def _append(self, owner: Ints, codes: Ints, label: int | None) -> None:
        self._part.owner.append(owner)
        self._part.codes.append(codes)
        if label is not None:
            self._part.labels.append(np.full(len(codes), label, dtype=np.int8))

    @staticmethod
    def _checked(arrays: Sequence[npt.NDArray[Any]], what: str, size: int) -> npt.NDArray[Any] | None:
        joined = np.concatenate(arrays) if arrays else None
        if joined is not None and joined.size != size:
            raise ValueError(
                f"users: expected {what} in every file or in none, {size - joined.size} rows lack them"
            )
        return joined


def _joined(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _complain(table: Table, chunk: Chunk) -> Complain:
    return lambda place, what: table.error(chunk.lines[place], what)


def _first_cells(table: Table, place: int) -> list[Any]:
    return [cell for chunk in islice(table.chunks([place]), 1) for cell in as_list(chunk.cells[0])]


def _times_in(table: Table, place: int) -> Numbers | None:
    """A column as times, in file order; None where a cell is none."""
    try:
        chunks = table.chunks([place])
        return np.concatenate([parse_times(c.cells[0], _complain(table, c))[0] for c in chunks])
    except ValueError:
        return None


def _names(cell: Any) -> Sequence[Any]:
    """The names in one cell; of a text without the empty ones, which are spaces that stand together."""
    found = parse_sequence(cell)
    return [name for name in found if name.strip()] if isinstance(cell, (str, bytes)) else found


def _entries(cell: Any) -> int:
    return len(_names(cell))


def _flat(cells: Any, lengths: Sequence[int], role: str, complain: Complain) -> list[Any]:
    """What goes with each item, row by row."""
    found = [_names(cell) for cell in as_list(cells)]
    for place, (length, entries) in enumerate(zip(lengths, found, strict=True)):
        if length != len(entries):
            raise complain(place, f"expected {length} {role}s, one for each of the items, got {len(entries)}")
    return list(chain.from_iterable(found))


def _is_tabbed(table: Table) -> bool:
    return isinstance(table, Delimited) and table.delimiter == "\t"


def _holds_sequences(table: Table, place: int) -> bool:
    """Whether a column's first cell is a sequence: a list, or in tab-separated text several names."""
    first = next(iter(table.chunks([place])), None)
    cell = as_list(first.cells[0])[0] if first is not None and len(first.lines) else None
    return " " in cell.strip() if _is_tabbed(table) and isinstance(cell, str) else isinstance(cell, list)
