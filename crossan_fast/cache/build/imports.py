"""`import_features`: a cache of states that were computed elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from crossan_fast.cache.build.build import build_cache
from crossan_fast.cache.build.features import Matched, match, open_features
from crossan_fast.cache.build.finish import BuildReport
from crossan_fast.cache.build.passes import Items
from crossan_fast.cache.build.specs import ModalitySpec
from crossan_fast.data.items import ItemTable


@dataclass(frozen=True)
class ImportReport:
    """Attributes:
    matched: by modality, how items and rows found each other.
    built: what was written.
    ids: what the ids file was taken for, where there is one.
    """

    matched: Mapping[str, Matched]
    built: BuildReport
    ids: str = ""

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.ids, *(f"{name}: {m}" for name, m in self.matched.items())]))


def import_features(
    sources: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    items: Items | None = None,
    ids: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    strict: bool = False,
    progress: bool = True,
) -> ImportReport:
    """Make a cache of states that exist already; run again with more items, it appends.

    Args:
        sources: by modality name, a file or a folder of any form in `crossan_fast.cache.build.features`.
        out: folder of the cache.
        items: whose states to keep, in this order (`read_items`); None: of every item that the sources name,
            in order of first appearance, and without names their rows from 0, as MMRec's `.inter` has them.
        ids: which item each row of the sources is, where they have no names of their own; None: rows are in
            the order of `items`.
        dtype: storage: `fp32`, `fp16`, `bf16` (default), `fp8` or `int8`.
        strict: raise where an item has no row, or a row no item.
        progress: show a bar.

    Raises:
        FileNotFoundError, ValueError: see `open_features`, `read_ids`, `match` of
            `crossan_fast.cache.build.features`; and see `build_cache`.
    """
    if not sources:
        raise ValueError("sources: expected at least one {modality: path}, got none")
    ids = None if ids is None else Path(ids)
    opened = {}
    for name, source in sources.items():
        own = not Path(source).is_dir() and ids is not None
        opened[name] = open_features(Path(source), ids if own else None, f"sources[{name!r}]")
    if items is None:
        known: dict[str, None] = {}
        for features in opened.values():
            rows = range(features.rows)
            known.update(dict.fromkeys(map(str, rows) if features.names is None else features.names))
        items = ItemTable(list(known), {})
    matched = {name: match(found, items.names, f"sources[{name!r}]") for name, found in opened.items()}
    if strict:
        for name, found in matched.items():
            if found.without or found.unused:
                raise ValueError(f"sources[{name!r}]: expected a row for each item and no others: {found}")
    specs = [
        ModalitySpec(
            name,
            str(sources[name]),
            precomputed=True,
            ids=str(ids) if ids is not None and not Path(sources[name]).is_dir() else None,
        )
        for name in opened
    ]
    built = build_cache(items, specs, out, dtype=dtype, strict=strict, progress=progress)
    return ImportReport(matched, built, next((found.ids for found in opened.values() if found.ids), ""))
