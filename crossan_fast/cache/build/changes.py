"""Which inputs a build has to encode: new items', and those that are not what their rows were made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossan_fast._checks import nearest
from crossan_fast.cache.ahead import read_ahead
from crossan_fast.cache.build.digests import EMPTY, HALF, UNREADABLE
from crossan_fast.cache.build.passes import Items, Pass
from crossan_fast.cache.contents import read_names, read_present, read_records
from crossan_fast.cache.format import RECORD_BYTES, CacheError, CacheMeta, Records
from crossan_fast.config import Modality

ALL = "all"

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Before:
    """What a cache holds already, for a build to compare with; empty where there is no cache yet.

    Attributes:
        rows: of items by name.
        present: bool `[I + 1, M]`.
        records: `[I + 1, M, 32]`, zeros where nothing is known.
    """

    rows: dict[str, int]
    present: Flags
    records: Records

    @classmethod
    def read(cls, folder: Path, meta: CacheMeta | None, modalities: int) -> Before:
        """Of the cache that `meta` describes."""
        if meta is None:
            return cls(
                {}, np.zeros((1, modalities), np.bool_), np.zeros((1, modalities, RECORD_BYTES), np.uint8)
            )
        names, present = read_names(folder, meta), read_present(folder, meta)
        records = read_records(folder, meta)
        if records is None:
            records = np.zeros((*present.shape, RECORD_BYTES), np.uint8)
        return cls({name: row for row, name in enumerate(names, start=1)}, present, records)


@dataclass(frozen=True)
class Changes:
    """What is to be encoded.

    Attributes:
        indices: of the items file's items with anything to encode, in the order of their rows.
        rows: theirs; new items' rows follow those of the cache.
        todo: for each pass bool `[n]`, which of them it is to encode.
        records: `[I + 1, M, 32]` of all rows, once that is done.
        unread: (item, modality) whose input was another, or none, and cannot be read now; their rows stay.
        unknown: items of the cache whose inputs may have changed or not: nothing is known of them.
        listed: items of the cache that the items file names.
    """

    indices: list[int]
    rows: list[int]
    todo: list[Flags]
    records: Records
    unread: list[tuple[str, str]] = field(default_factory=list)
    unknown: int = 0
    listed: int = 0


def find_changes(
    items: Items,
    passes: Sequence[Pass],
    modalities: Sequence[Modality],
    before: Before,
    re_encode: str | Collection[str] = (),
) -> Changes:
    """Compare every input of the items file with what its row was made from.

    Args:
        re_encode: names of items to encode again whatever their inputs are, or `all`.

    Raises:
        KeyError: a name in `re_encode` that the items file lacks.
        CacheError: precomputed states of one modality are those that the cache has of another.
    """
    forced = _forced(items.names, re_encode)
    old_items = len(before.present) - 1
    rows = np.array([before.rows.get(name, 0) for name in items.names], np.int64).reshape(-1)
    new = rows == 0
    rows[new] = old_items + 1 + np.arange(new.sum())
    records = np.zeros((old_items + int(new.sum()) + 1, len(modalities), RECORD_BYTES), np.uint8)
    records[: old_items + 1] = before.records
    place = np.where(new, 0, rows)  # row 0 is the padding: absent, and nothing known of it
    column_of = {m.name: column for column, m in enumerate(modalities)}
    needed, unread, unknown = [], [], np.zeros(len(rows), np.bool_)
    for work in passes:
        columns = [column_of[m.name] for m in work.modalities]
        now = _records(work, before.records[place, columns[0]])
        unreadable, needs = _is(now, UNREADABLE), new.copy()
        for column in columns:
            known, same, had, changed = _compare(now, before, place, column)
            if "precomputed" in work.records[modalities[column].name]:
                _refuse_swapped(now, before, place, column, changed & ~new, modalities)
            changed = (changed | forced) & ~new
            lost = changed & unreadable & had
            unread += [(items.names[i], modalities[column].name) for i in lost.nonzero()[0].tolist()]
            needs |= changed & ~unreadable
            unknown |= ~new & ~known & had & ~changed
            records[rows[known & same], column] = now[known & same]  # the file's times may be others
        for column in columns:
            records[rows[needs], column] = now[needs]
        needed.append(needs)
    chosen = np.flatnonzero(np.logical_or.reduce(needed))
    chosen = chosen[np.argsort(rows[chosen], kind="stable")]
    return Changes(
        chosen.tolist(),
        rows[chosen].tolist(),
        [needs[chosen] for needs in needed],
        records,
        unread,
        int(unknown.sum()),
        int((~new).sum()),
    )


def _forced(names: Sequence[str], re_encode: str | Collection[str]) -> Flags:
    if isinstance(re_encode, str):
        if re_encode != ALL:
            raise ValueError(f"re_encode: expected names of items or {ALL!r}, got {re_encode!r}")
        return np.ones(len(names), np.bool_)
    asked, known = set(re_encode), set(names)
    for name in re_encode:
        if name not in known:
            raise KeyError(f"re_encode: no item {name!r} in the items file{nearest(name, names)}")
    return np.array([name in asked for name in names], np.bool_).reshape(-1)


def _records(work: Pass, before: Records) -> Records:
    def record(index: int) -> bytes:
        return work.record(index, before[index].tobytes())

    if work.threads == 1:
        found = [record(index) for index in range(len(before))]
    else:
        read = read_ahead(range(len(before)), record, depth=16 * work.threads, threads=work.threads)
        found = [one for _, one in read]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, RECORD_BYTES)


def _compare(now: Records, before: Before, place: npt.NDArray[np.int64], column: int) -> tuple[Flags, ...]:
    """Whether a record is known, is the same, its row has the modality, and its input is another one now.

    Where nothing is known, an input that came or went still shows.
    """
    then, had = before.records[place, column], before.present[place, column]
    known = then[:, :HALF].any(axis=1)
    same = (then[:, :HALF] == now[:, :HALF]).all(axis=1)
    empty = _is(now, EMPTY)
    changed = np.where(known, ~same, np.where(had, empty, ~empty & ~_is(now, UNREADABLE)))
    return known, same, had, changed


def _refuse_swapped(
    now: Records,
    before: Before,
    place: npt.NDArray[np.int64],
    column: int,
    changed: Flags,
    modalities: Sequence[Modality],
) -> None:
    """Raise where most of what changed is what the cache has of the same items in another column."""
    changed = changed & ~_is(now, EMPTY) & ~_is(now, UNREADABLE)
    for other, modality in enumerate(modalities):
        alike = int((before.records[place, other, :HALF] == now[:, :HALF]).all(axis=1)[changed].sum())
        if 2 * alike > changed.sum():
            name = modalities[column].name
            raise CacheError(
                f"modality {name!r}: source: expected its own states, got those that the cache has of "
                f"{modality.name!r} in {alike} of {int(changed.sum())} rows that changed; files of one width "
                "may have been swapped"
            )


def _is(records: Records, record: bytes) -> Flags:
    return np.asarray((records[:, :HALF] == np.frombuffer(record[:HALF], np.uint8)).all(axis=1))
