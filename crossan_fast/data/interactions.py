r"""Users files: who took what, in which order.

Two layouts are told apart by their first line. IISAN's, tab-separated, items in time order, no header:

    A0096681Y127OL1H8W3U<TAB>B0098MLBAO B0098MLBAO B00E8JOCOE B00S730YWG B0098MLBAO

MicroLens', one line an interaction in any order, with a header (tabs or commas; times are numbers of any
unit):

    user,item,timestamp
    36121,9580,1584904502112

What comes out are `Interactions`: catalogue rows (row 0 is padding) in time order, with the names both ways.
"""

from __future__ import annotations

import math
import os
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from crossan_fast.data._tables import Table
from crossan_fast.data.catalogue import Catalogue
from crossan_fast.data.items import ITEM_COLUMNS

USER_COLUMNS = ("user", "user_id", "userid")
TIME_COLUMNS = ("timestamp", "time")


@dataclass(frozen=True)
class Dropped:
    """What a reader left out, for reports."""

    unknown_items: int = 0
    """Distinct item names that the items file lacks."""
    unknown_interactions: int = 0
    """Interactions with them."""
    short_users: int = 0
    """Users with fewer than `min_items` known items."""
    old_interactions: int = 0
    """Interactions before a kept user's last `max_items`."""
    unused_items: int = 0
    """Items of the items file without a catalogue row."""

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in vars(self).items())


@dataclass(frozen=True)
class Interactions:
    """Sequences of catalogue rows: user u took `ids[offsets[u]:offsets[u + 1]]` (int64), oldest first.

    `item_names[i]` is the name of row i; row 0 is padding and its name is the empty string. `max_items` is
    what the reader was asked to keep of each user, None for everything.
    """

    user_names: list[str]
    item_names: list[str]
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    dropped: Dropped = field(default_factory=Dropped)
    max_items: int | None = None
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.item_names or self.item_names[0] != "":
            raise ValueError(f"item_names: expected '' (padding) at row 0, got {self.item_names[:1]!r}")
        object.__setattr__(self, "_rows", {name: row for row, name in enumerate(self.item_names) if row})
        if len(self._rows) != self.num_items or "" in self._rows:
            raise ValueError("item_names: expected distinct names that are not empty from row 1 on")
        offsets = self.offsets
        if (
            offsets.shape != (self.num_users + 1,)
            or offsets[0] != 0
            or offsets[-1] != self.ids.size
            or (np.diff(offsets) < 0).any()
        ):
            raise ValueError(
                f"offsets: expected {self.num_users + 1} places that rise from 0 to {self.ids.size}, "
                f"got {offsets.tolist()[:6]} ... of shape {list(offsets.shape)}"
            )
        if self.ids.size and not (self.ids.min() >= 1 and self.ids.max() <= self.num_items):
            raise ValueError(
                f"ids: expected rows from 1 to {self.num_items}, got {self.ids.min()} to {self.ids.max()}"
            )

    @property
    def num_users(self) -> int:
        return len(self.user_names)

    @property
    def num_items(self) -> int:
        """Rows without the padding row."""
        return len(self.item_names) - 1

    @cached_property
    def catalogue(self) -> Catalogue:
        """What the rows mean."""
        return Catalogue.of(self.item_names[1:])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Items of each user, [U]."""
        return np.diff(self.offsets)

    def sequence(self, user: int) -> npt.NDArray[np.int64]:
        """Rows that user number `user` took, oldest first."""
        if not 0 <= user < self.num_users:
            raise IndexError(f"user: expected 0 to {self.num_users - 1}, got {user}")
        return self.ids[self.offsets[user] : self.offsets[user + 1]]

    def row_of(self, name: str) -> int:
        """Catalogue row of an item name; KeyError naming it where the catalogue lacks it."""
        try:
            return self._rows[name]
        except KeyError:
            raise KeyError(f"name: item {name!r} is not in the catalogue of {self.num_items} items") from None

    def name_of(self, row: int) -> str:
        """Item name of a catalogue row; IndexError for the padding row and beyond the catalogue."""
        if not 1 <= row <= self.num_items:
            raise IndexError(f"row: expected 1 to {self.num_items}, got {row}")
        return self.item_names[row]

    def __str__(self) -> str:
        return f"{self.num_users:,} users, {self.num_items:,} items, {self.ids.size:,} interactions"


def read_interactions(
    path: str | os.PathLike[str],
    items: Sequence[str] | None,
    *,
    min_items: int = 5,
    max_items: int | None = None,
    catalogue: Literal["all", "used"] = "all",
    strict: bool = False,
) -> Interactions:
    """Read a users file in either layout above.

    Users with fewer than `min_items` items are left out and of the others the last `max_items` items kept;
    with None everything is kept here, and `leave_one_out` keeps what its window asks for (IISAN keeps 13, a
    window of 10 with its training, validation and test targets). `items` are the known names
    (`ItemTable.names`, or a cache's `item_names`; a leading '' for the padding row is allowed); with None
    every name in the file is known, in order of first appearance. With `catalogue="all"` every one of `items`
    has its row, so that rows are those of a cache whose names are given; with `"used"`, as IISAN has it, the
    items that occur in what is kept get rows 1, 2, ... in the order of `items`: rows of a catalogue of their
    own, which no cache of all `items` has.

    Interactions with unknown items are dropped with a counted warning before `min_items` is applied, or are
    an error with `strict`. Users keep the order in which they first appear in the file; equal timestamps keep
    file order.

    Raises FileNotFoundError; ValueError naming the line for bytes that are not UTF-8, a wrong number of
    columns, a user on two lines of an IISAN file, an empty name and a time that is no finite number;
    ValueError for an empty file, repeated names in `items`, and when no user is left.
    """
    table = Table(path, "users", USER_COLUMNS)
    if table.header is not None and table.column(TIME_COLUMNS) is not None:
        raw = _read_events(table)
    elif table.delimiter == "\t" and table.width == 2:
        raw = _read_sequences(table)
    else:
        raise ValueError(
            f"users: {table.path}: expected `user<TAB>item item item ...` or a header with the columns "
            f"user, item, timestamp; got {table.width} {table.separator}-separated columns "
            + (f"named {', '.join(table.header)}" if table.header else "without a header")
        )
    return _assemble(
        raw, items, f"users: {table.path}", min_items, max_items, catalogue, strict, stacklevel=3
    )


def build_interactions(
    sequences: Mapping[str, Sequence[str]],
    items: Sequence[str] | None = None,
    *,
    min_items: int = 5,
    max_items: int | None = None,
    catalogue: Literal["all", "used"] = "all",
    strict: bool = False,
) -> Interactions:
    """`read_interactions` for sequences at hand: `{user: item names, oldest first}`, otherwise the same."""
    encoder = _Encoder()
    for user, names in sequences.items():
        encoder.add(user, names)
    return _assemble(
        encoder.finish(), items, "sequences", min_items, max_items, catalogue, strict, stacklevel=3
    )


class _Raw(NamedTuple):
    """Sequences as a file has them: user u's items are `vocabulary[codes[offsets[u]:offsets[u + 1]]]`."""

    user_names: list[str]
    vocabulary: list[str]
    codes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


class _Encoder:
    """Names to codes as they come, so that a file of millions of interactions costs 8 bytes each."""

    def __init__(self) -> None:
        self.user_names: list[str] = []
        self.codes = array("q")
        self.vocabulary: dict[str, int] = {}
        self.ends = array("q", [0])

    def code(self, name: str) -> int:
        return self.vocabulary.setdefault(name, len(self.vocabulary))

    def add(self, user: str, names: Sequence[str]) -> None:
        self.user_names.append(user)
        self.codes.extend(map(self.code, names))
        self.ends.append(len(self.codes))

    def finish(self) -> _Raw:
        codes, offsets = np.asarray(self.codes, dtype=np.int64), np.asarray(self.ends, dtype=np.int64)
        return _Raw(self.user_names, list(self.vocabulary), codes, offsets)


def _read_sequences(table: Table) -> _Raw:
    encoder = _Encoder()
    first_line: dict[str, int] = {}
    user_column = table.column(USER_COLUMNS) or 0
    for line, cells in table.rows():
        user = cells[user_column].strip()
        if not user:
            raise table.error(line, "the user's name is empty")
        if first_line.setdefault(user, line) != line:
            raise table.error(line, f"user {user!r} is already on line {first_line[user]}")
        encoder.add(user, [name for name in cells[1 - user_column].split(" ") if name])
    return encoder.finish()


def _read_events(table: Table) -> _Raw:
    user_column, item_column = table.column(USER_COLUMNS), table.column(ITEM_COLUMNS)
    time_column = table.column(TIME_COLUMNS)
    if user_column is None or item_column is None or time_column is None:
        raise ValueError(
            f"users: {table.path}: expected a header with the columns user, item, timestamp; "
            f"got {', '.join(table.header or ())}"
        )
    encoder, users, user_codes = _Encoder(), dict[str, int](), array("q")
    times: list[float] = []  # int where the file has integers: nanoseconds do not fit a float
    for line, cells in table.rows():
        user, item = cells[user_column].strip(), cells[item_column].strip()
        if not user or not item:
            raise table.error(line, f"the {'item' if user else 'user'}'s name is empty")
        times.append(_time(table, line, cells[time_column]))
        user_codes.append(users.setdefault(user, len(users)))
        encoder.codes.append(encoder.code(item))
    owner = np.asarray(user_codes, dtype=np.int64)
    order = np.lexsort((np.array(times), owner))  # stable: equal times keep file order
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(users)))]).astype(np.int64)
    codes = np.asarray(encoder.codes, dtype=np.int64)[order]
    return _Raw(list(users), list(encoder.vocabulary), codes, offsets)


def _time(table: Table, line: int, cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        pass
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise table.error(line, f"expected a finite number as timestamp, got {cell!r}")
    return value


def _find(
    raw: _Raw, names: list[str], source: str, strict: bool, stacklevel: int
) -> tuple[npt.NDArray[np.int64], Dropped]:
    """The place of each interaction's item among `names`, −1 where it is unknown; and how many are."""
    index = {name: i for i, name in enumerate(names)}
    if len(index) != len(names):
        repeated = next(name for i, name in enumerate(names) if index[name] != i)
        raise ValueError(f"items: {repeated!r} occurs more than once among {len(names)} names")
    index_of_code = np.array([index.get(name, -1) for name in raw.vocabulary], dtype=np.int64)
    picked = index_of_code[raw.codes]
    unknown = Dropped(
        unknown_items=int((index_of_code < 0).sum()), unknown_interactions=int((picked < 0).sum())
    )
    if unknown.unknown_items:
        examples = [name for name in raw.vocabulary if name not in index][:3]
        message = (
            f"{source}: {unknown.unknown_interactions} interactions with {unknown.unknown_items} items that "
            f"the items file lacks, such as {', '.join(map(repr, examples))}"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(f"{message}; dropped", stacklevel=stacklevel)
    return picked, unknown


def _assemble(
    raw: _Raw,
    items: Sequence[str] | None,
    source: str,
    min_items: int,
    max_items: int | None,
    catalogue: str,
    strict: bool,
    stacklevel: int,
) -> Interactions:
    if min_items < 1 or (max_items is not None and max_items < min_items):
        raise ValueError(f"min_items, max_items: expected 1 <= min <= max, got {min_items} and {max_items}")
    if catalogue not in ("all", "used"):
        raise ValueError(f"catalogue: expected 'all' or 'used', got {catalogue!r}")
    names = list(raw.vocabulary if items is None else items[1:] if items and items[0] == "" else items)
    picked, unknown = _find(raw, names, source, strict, stacklevel + 1)
    known = picked >= 0
    owner = np.repeat(np.arange(len(raw.user_names)), np.diff(raw.offsets))[known]
    picked = picked[known]
    lengths = np.bincount(owner, minlength=len(raw.user_names))
    if not (long_enough := lengths >= min_items).any():
        raise ValueError(
            f"{source}: none of {len(raw.user_names)} users has min_items = {min_items} known items "
            f"(the longest has {lengths.max(initial=0)})"
        )
    of_kept_user = long_enough[owner]
    most = lengths.max() if max_items is None else max_items
    from_end = np.cumsum(lengths)[owner] - np.arange(len(owner))  # 1 at a user's newest item
    kept = of_kept_user & (from_end <= most)
    kept_items = picked[kept]

    used = np.ones(len(names), dtype=bool)
    if catalogue == "used":
        used = np.bincount(kept_items, minlength=len(names)) > 0
    row_of_index = np.cumsum(used)  # 1 is the first used item's
    kept_lengths = np.minimum(lengths[long_enough], most)
    return Interactions(
        user_names=[raw.user_names[user] for user in np.flatnonzero(long_enough)],
        item_names=["", *(names[i] for i in np.flatnonzero(used))],
        ids=row_of_index[kept_items].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(kept_lengths)]).astype(np.int64),
        dropped=Dropped(
            unknown_items=unknown.unknown_items,
            unknown_interactions=unknown.unknown_interactions,
            short_users=int((~long_enough).sum()),
            old_interactions=int(of_kept_user.sum() - kept.sum()),
            unused_items=int((~used).sum()),
        ),
        max_items=max_items,
    )
