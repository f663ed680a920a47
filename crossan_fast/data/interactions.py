r"""Users files: who took what, in which order.

A source is a file, which may be gzipped, or a frame of pandas or polars, a `datasets.Dataset` or a pyarrow
table; what it holds is told by its first bytes and its header. IISAN's layout (MicroLens' pairs),
tab-separated, items in time order, no header:

    A0096681Y127OL1H8W3U<TAB>B0098MLBAO B0098MLBAO B00E8JOCOE B00S730YWG B0098MLBAO

Any table with an interaction a row, in any order (MicroLens, Amazon Reviews 2023, MMRec's and RecBole's
`.inter`, …): tabs, commas or semicolons with a header, JSON lines, Parquet, a frame. Times are numbers of any
unit or ISO 8601; without a column of times rows are in the file's order. Of several columns of times the
first known name counts (`crossan_fast.data.columns`) where the others agree with its order:

    user,item,timestamp              user_id:token<TAB>item_id:token<TAB>timestamp:float
    36121,9580,1584904502112         36121<TAB>9580<TAB>1584904502

Any table with a user's sequence a row: a column of lists, or of names with spaces between them, in time order
unless a column holds as many times as there are items (likewise ratings and a split's labels; one time for
a whole row says nothing of its items and is passed over). RecBole's
rows of a history and the item behind it (`item_id_list:token_seq`, `item_id:token`), of which a user's
longest counts.

A split that comes with the data is read from its column (`x_label`, `split`: 0, 1, 2 or train, validation,
test) with `labels=True`, and else passed over; or from files or frames of its own,
`{"train": …, "validation": …, "test": …}`.

What comes out are `Interactions`: catalogue rows (row 0 is padding) in time order, with the names both ways.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from crossan_fast._checks import check_integer, nearest
from crossan_fast.data._open import Source, open_table
from crossan_fast.data._raw import Raw, RawBuilder
from crossan_fast.data._values import LABELS, Numbers, TimeUnit
from crossan_fast.data.catalogue import Catalogue
from crossan_fast.data.columns import USERS_ROLES, Columns


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
    low_ratings: int = 0
    """Interactions rated below `min_rating`."""
    bare_items: int = 0
    """Distinct items that occur and that no model can embed: `bare`."""
    bare_interactions: int = 0
    """Interactions with them."""

    def __str__(self) -> str:
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in vars(self).items() if count]
        return ", ".join(counts) or "nothing"


@dataclass(frozen=True)
class Interactions:
    """Sequences of catalogue rows: user u took `ids[offsets[u]:offsets[u + 1]]` (int64), oldest first.

    `item_names[i]` is the name of row i; row 0 is padding and its name is the empty string. `max_items` is
    what the reader was asked to keep of each user, None for everything. `times` (in `time_unit`, Unix) and
    `labels` (a given split: 0 training, 1 validation, 2 testing, which come in this order) go with `ids`
    where the source has them. `taken_for` says what it was, and which columns were read.
    """

    user_names: list[str]
    item_names: list[str]
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    dropped: Dropped = field(default_factory=Dropped)
    max_items: int | None = None
    times: Numbers | None = None
    time_unit: TimeUnit | None = None
    labels: npt.NDArray[np.int8] | None = None
    taken_for: str = ""
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
    source: Source | Mapping[str, Source],
    items: Sequence[str] | None,
    *,
    min_items: int = 5,
    max_items: int | None = None,
    catalogue: Literal["all", "used"] = "all",
    strict: bool = False,
    columns: Mapping[str, str | int] | None = None,
    min_rating: float | None = None,
    labels: bool | None = None,
    bare: Sequence[int] = (),
) -> Interactions:
    """Read users' interactions from a file or a frame in any layout above.

    Users with fewer than `min_items` items are left out and of the others the last `max_items` items kept,
    which may be fewer; with None everything is kept here, and `leave_one_out` keeps what its window asks for
    (IISAN keeps 13, a window of 10 with its training, validation and test targets). `items` are the known
    names (`ItemTable.names`, or a cache's `item_names`; a leading '' for the padding row is allowed); with
    None every name in the file is known, in order of first appearance. With `catalogue="all"` every one of
    `items` has its row, so that rows are those of a cache whose names are given; with `"used"`, as IISAN has
    it, the items that occur in what is kept get rows 1, 2, ... in the order of `items`: rows of a catalogue
    of their own, which no cache of all `items` has.

    `columns` says which column is which where the names are none of the usual ones
    (`crossan_fast.data.columns`): of `user`, `item`, `items` (sequences), `time`, `rating` and `label` (a
    given split); numbers are places, from 1, in a file without a header. Interactions rated below
    `min_rating` are left out.

    With `labels` a column of a given split is read, for `as_given`: a user's training items then come first,
    validation and test items behind them, each in time order. Without it sequences are in time order alone.
    None: where `columns` says which column it is.

    Interactions with unknown items are dropped with a counted warning before `min_items` is applied, or are
    an error with `strict`; likewise those with the items at the rows `bare` (from 1, in `items`), of which
    nothing is known that a model could read (`HiddenStateCache.bare_mask`). Users keep the order in which
    they first appear in the file; equal timestamps keep file order.

    Raises FileNotFoundError; ImportError for Parquet and frames without pyarrow; TypeError for a source of
    another kind; ValueError naming the line for bytes that are not UTF-8, a wrong number of columns, a user
    on two lines of an IISAN file, an empty name and a time or rating that cannot be read; ValueError for an
    empty file, a column that is not there, repeated names in `items`, and when no user is left.
    """
    wishes = Columns(columns, USERS_ROLES)
    builder = RawBuilder(wishes, min_rating, wishes.wished("label") if labels is None else labels)
    parts = _labelled(source) if isinstance(source, Mapping) else [(None, source)]
    for label, part in parts:
        table = open_table(part, "users", wishes.keys("user"))
        builder.add(table, label)
    raw = builder.finish()
    where = raw.taken_for.partition(": taken for")[0] if len(parts) == 1 else "its files"
    return _assemble(raw, items, f"users: {where}", min_items, max_items, catalogue, strict, 3, bare)


def split_files(path: Path) -> dict[str, Path] | None:
    """The parts of a split that stand beside `path`, as RecBole's benchmarks and Amazon's have them.

    `X.train.inter` goes with `X.valid.inter` and `X.test.inter`, whatever the suffix. None where `path` is
    not named so, or one of the others is not there.
    """
    found = {}
    for part, names in (
        ("train", ("train",)),
        ("validation", ("valid", "validation", "val")),
        ("test", ("test",)),
    ):
        others = (path.with_name(re.sub(r"\btrain\b", name, path.name)) for name in names)
        there = next((other for other in others if other.is_file()), None)
        if there is None or not re.search(r"\btrain\b", path.name):
            return None
        found[part] = there
    return found


def _labelled(parts: Mapping[str, Source]) -> list[tuple[int | None, Source]]:
    for part in parts:
        if part not in LABELS:
            raise ValueError(
                f"users: expected parts named train, validation and test, got {part!r}{nearest(part, LABELS)}"
            )
    return [(LABELS[part], source) for part, source in parts.items()]


def build_interactions(
    sequences: Mapping[str, Sequence[str]],
    items: Sequence[str] | None = None,
    *,
    min_items: int = 5,
    max_items: int | None = None,
    catalogue: Literal["all", "used"] = "all",
    strict: bool = False,
    bare: Sequence[int] = (),
) -> Interactions:
    """`read_interactions` for sequences at hand: `{user: item names, oldest first}`, otherwise the same.

    ValueError naming the user for a string in place of a list of names.
    """
    builder = RawBuilder(Columns(None, USERS_ROLES), None)
    builder.add_sequences(sequences)
    return _assemble(builder.finish(), items, "sequences", min_items, max_items, catalogue, strict, 3, bare)


def _without_bare(
    picked: npt.NDArray[np.int64],
    bare: Sequence[int],
    names: list[str],
    source: str,
    strict: bool,
    stacklevel: int,
) -> tuple[npt.NDArray[np.int64], Dropped]:
    """`picked` with −1 for what nothing can embed; and how many that are."""
    gone = np.isin(picked, np.asarray(bare, dtype=np.int64) - 1) & (picked >= 0)
    found = np.unique(picked[gone])
    if not found.size:
        return picked, Dropped()
    examples = ", ".join(repr(names[place]) for place in found[:3])
    message = (
        f"{source}: {int(gone.sum())} interactions with {found.size} items that have no modality at all, "
        f"such as {examples}"
    )
    if strict:
        raise ValueError(message)
    warnings.warn(f"{message}; dropped", stacklevel=stacklevel)
    return np.where(gone, -1, picked), Dropped(bare_items=int(found.size), bare_interactions=int(gone.sum()))


def _find(
    raw: Raw, names: list[str], source: str, strict: bool, stacklevel: int
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


def _check_arguments(
    items: Sequence[str] | None, min_items: int, max_items: int | None, catalogue: str
) -> None:
    check_integer("min_items", min_items, 1)
    if max_items is not None:
        check_integer("max_items", max_items, 1)
    if isinstance(items, str | bytes):  # its letters would be taken for names
        raise TypeError(f"items: expected a list of item names, got {items!r}")
    if catalogue not in ("all", "used"):
        raise ValueError(f"catalogue: expected 'all' or 'used', got {catalogue!r}")


def _assemble(
    raw: Raw,
    items: Sequence[str] | None,
    source: str,
    min_items: int,
    max_items: int | None,
    catalogue: str,
    strict: bool,
    stacklevel: int,
    bare: Sequence[int] = (),
) -> Interactions:
    _check_arguments(items, min_items, max_items, catalogue)
    names = list(raw.vocabulary if items is None else items[1:] if items and items[0] == "" else items)
    picked, unknown = _find(raw, names, source, strict, stacklevel + 1)
    picked, without = _without_bare(picked, bare, names, source, strict, stacklevel + 1)
    known = np.flatnonzero(picked >= 0)
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
    kept_items, kept_places = picked[kept], known[kept]

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
            low_ratings=raw.low_ratings,
            bare_items=without.bare_items,
            bare_interactions=without.bare_interactions,
        ),
        max_items=max_items,
        times=None if raw.times is None else raw.times[kept_places],
        time_unit=raw.unit,
        labels=None if raw.labels is None else raw.labels[kept_places],
        taken_for=raw.taken_for,
    )
