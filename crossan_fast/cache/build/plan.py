"""What a build is to do, settled and checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossan_fast.cache.build.changes import Before, Changes, find_changes
from crossan_fast.cache.build.passes import Items, Pass
from crossan_fast.cache.build.specs import ModalitySpec
from crossan_fast.cache.folders import holds_anything, restore_retired
from crossan_fast.cache.format import (
    BUILDING,
    META,
    PRESENT,
    CacheError,
    CacheMeta,
    dtype_name,
    read_meta,
    scales_file,
    states_file,
    storage_dtype,
)
from crossan_fast.config import Modality

# What may differ between a cache and what is appended to it: where things are, not what they are.
_PLACES = ("encoder", "fingerprint", "column", "precomputed", "converted_from")


@dataclass(frozen=True)
class BuildPlan:
    """What is to be encoded, and what it is to be appended to.

    Attributes:
        passes: over the items; together they serve all `modalities`.
        modalities: in the order that was asked for, the cache's.
        records: by modality name, how its states are made.
        dtype: storage.
        base: the cache to append to, or None.
        before: what `base` holds.
        changes: which of the items file's items are to be encoded, and to which rows.
        digest: of what must stay the same for a stopped build to go on, by what to call it.
    """

    passes: Sequence[Pass]
    modalities: tuple[Modality, ...]
    records: dict[str, dict[str, Any]]
    dtype: torch.dtype
    base: CacheMeta | None
    before: Before
    changes: Changes
    digest: dict[str, str]

    @property
    def indices(self) -> list[int]:
        return self.changes.indices

    @property
    def base_items(self) -> int:
        return self.base.num_items if self.base else 0

    @property
    def old(self) -> int:
        """How many of `indices` have rows in `base`; they come first."""
        return sum(row <= self.base_items for row in self.changes.rows)

    @property
    def num_items(self) -> int:
        return self.base_items + len(self.indices) - self.old

    @property
    def base_key(self) -> str:
        """Of this very state of `base`, '' for none."""
        return _sha256(self.base.to_json()) if self.base else ""

    @property
    def anew(self) -> set[str]:
        """Files of `base` in which old rows change."""
        files = {PRESENT} if self.old else set()
        for work, todo in zip(self.passes, self.changes.todo, strict=True):
            if todo[: self.old].any():
                files |= {name(m) for m in work.modalities for name in (states_file, scales_file)}
        return files

    @classmethod
    def make(
        cls,
        specs: Sequence[ModalitySpec],
        passes: Sequence[Pass],
        items: Items,
        base: CacheMeta | None,
        folder: Path,
        dtype: str | torch.dtype | None,
        compute_dtype: str,
        re_encode: str | Collection[str] = (),
    ) -> BuildPlan:
        found = {m.name: m for p in passes for m in p.modalities}
        records = {name: dict(record) for p in passes for name, record in p.records.items()}
        for record in records.values():
            if "encoder" in record:
                record["compute_dtype"] = compute_dtype
        modalities = tuple(found[spec.name] for spec in specs)
        if len({m.levels for m in modalities}) > 1:
            counts = ", ".join(f"{m.name} {m.levels}" for m in modalities)
            raise ValueError(f"levels: expected the same number for every modality, got {counts}")
        if dtype is None:
            dtype = base.dtype if base else "bf16"
        storage = storage_dtype(dtype)
        if base is not None:
            _check_same(base, modalities, records, storage, folder)
        before = Before.read(folder, base, len(modalities))
        changes = find_changes(items, passes, modalities, before, re_encode)
        columns = sorted({p.records[m.name].get("column", "") for p in passes for m in p.modalities} - {""})
        cells = [[items.names[i], *(items.columns[c][i] for c in columns)] for i in changes.indices]
        todo = [] if base is None else [changes.rows, *(needed.tolist() for needed in changes.todo)]
        digest = {
            "modalities": _sha256([dataclasses.astuple(m) for m in modalities]),
            "settings": _sha256([dtype_name(storage), *(_comparable(records[m.name]) for m in modalities)]),
            "items": _sha256([cells, todo]),
        }
        return cls(passes, modalities, records, storage, base, before, changes, digest)


def existing_cache(folder: Path) -> CacheMeta | None:
    """Meta of the cache in `folder`, None where there is none yet."""
    restore_retired(folder)
    if (folder / META).is_file():
        return read_meta(folder)
    if holds_anything(folder) and not (folder / BUILDING).is_file():
        raise FileExistsError(f"folder: {folder} is not empty and is no cache; expected a new folder")
    return None


def specs_for(
    modalities: Sequence[ModalitySpec | str] | None,
    base: CacheMeta | None,
    max_length: int | None = None,
    lowercase: bool | None = None,
) -> list[ModalitySpec]:
    """Modalities parsed and checked; where none are given, those that `base` was built with.

    Args:
        max_length, lowercase: where a modality does not say; None: as `base` was built.
    """
    given = {"max_length": max_length, "lowercase": lowercase}
    if not modalities:
        if base is None:
            raise ValueError(
                "modalities: expected at least one, got none; only an existing cache has its own"
            )
        return [_filled(_spec_of(m, base.sources[m.name]), base, given) for m in base.modalities]
    specs = [ModalitySpec.parse(m) if isinstance(m, str) else m for m in modalities]
    names = [spec.name for spec in specs]
    for name in names:
        Modality(name, width=1, levels=1)  # checks the name
        if names.count(name) > 1:
            raise ValueError(f"modalities: expected different names, got {name!r} twice")
    return [_filled(spec, base, given) for spec in specs]


def _filled(spec: ModalitySpec, base: CacheMeta | None, given: Mapping[str, Any]) -> ModalitySpec:
    """With what `spec` leaves open as `given`, else as `base` was built."""
    built = base.sources.get(spec.name, {}) if base else {}
    left: dict[str, Any] = {
        key: built.get(key) if value is None else value
        for key, value in given.items()
        if getattr(spec, key) is None
    }
    return dataclasses.replace(spec, **left)


def _spec_of(modality: Modality, source: Mapping[str, Any]) -> ModalitySpec:
    """The spec that built a modality of an existing cache."""
    if "encoder" not in source:
        raise ValueError(
            f"modalities: the cache does not say which encoder made {modality.name!r}; "
            f"expected {modality.name}=SOURCE"
        )
    return ModalitySpec(
        modality.name,
        source["encoder"],
        pool=source["pool"],
        levels=tuple(source["layers"]),
        column=source["column"],
        kind=source["kind"],
    )


def _check_same(
    base: CacheMeta,
    modalities: tuple[Modality, ...],
    records: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Raise where appending to `base` would mix rows of different making."""
    problems = []
    if dtype != base.dtype:
        problems.append(f"dtype {dtype_name(base.dtype)}, not {dtype_name(dtype)}")
    if modalities != base.modalities:
        had, now = ([f"{m.name} {m.levels}×{m.width}" for m in ms] for ms in (base.modalities, modalities))
        problems.append(f"modalities {had}, not {now}")
    else:
        for m in modalities:
            had_record, now_record = _comparable(base.sources[m.name]), _comparable(records[m.name])
            problems += [
                f"{m.name}: {key} {had_record.get(key)!r}, not {now_record.get(key)!r}"
                for key in sorted({*had_record, *now_record})
                if had_record.get(key) != now_record.get(key)
            ]
    if problems:
        raise CacheError(f"folder: the cache in {folder} was built with " + "; ".join(problems))


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _PLACES}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
