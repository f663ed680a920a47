"""A cache's folder mapped into memory, and how much of it is compared with its checksums when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast.cache.contents import read_frames, read_present
from crossan_fast.cache.format import (
    NAMES,
    CacheMeta,
    CorruptCacheError,
    is_quantized,
    scales_file,
    states_file,
)
from crossan_fast.cache.frame import Frame
from crossan_fast.cache.names import ItemNames
from crossan_fast.cache.segments import CheckedSegments
from crossan_fast.cache.tiers import MappedFile
from crossan_fast.cache.verify import verify_cache

Verify = Literal["open", "lazy", "off"]

# Of names and scales, what is read at once when a cache is opened: some milliseconds.
_SMALL_BYTES = 8 << 20


@dataclass(frozen=True)
class Mapped:
    """What an opened folder holds.

    Attributes:
        states, scales: mapped, for each modality in order; scales of int8 and fp8 alone.
        present: bool `[I + 1, M]`, in memory.
        names: of rows 1..I.
        frames: by modality name.
        files: those of `states`, then of `scales`.
        segments: theirs, to be compared before their first use; none where that is done, or not wanted.
    """

    states: list[Tensor]
    scales: list[Tensor] | None
    present: Tensor
    names: ItemNames
    frames: dict[str, Frame]
    files: list[MappedFile]
    segments: list[CheckedSegments]


def checked_verify(verify: Verify | bool) -> Verify:
    """`verify` as a word; True and False stand for `open` and `off`."""
    if isinstance(verify, bool):
        return "open" if verify else "off"
    if verify not in get_args(Verify):
        raise ValueError(
            f"verify: expected {', '.join(get_args(Verify))}, True or False, got {verify!r}"
            f"{nearest(str(verify), get_args(Verify))}"
        )
    return verify


def map_folder(folder: Path, meta: CacheMeta, verify: Verify) -> Mapped:
    """Map the files that `meta` describes; raises as `HiddenStateCache.open`."""
    if verify == "open" and (problems := verify_cache(folder)):
        raise CorruptCacheError(f"folder: {folder} is damaged: " + "; ".join(problems))
    rows = meta.num_items + 1
    names = [states_file(m) for m in meta.modalities]
    if is_quantized(meta.dtype):
        names += [scales_file(m) for m in meta.modalities]
    files = [MappedFile(folder / meta.file(name), meta.committed(name)) for name in names]
    held = {m: file.bytes for m, file in zip(meta.modalities, files, strict=False)}
    factors = [
        file.bytes.view(torch.float32).view(rows, m.levels)
        for m, file in zip(meta.modalities, files[len(held) :], strict=False)
    ]
    item_names = ItemNames(
        meta.num_items,
        folder / meta.file(NAMES),
        meta.segments.get(NAMES, ()) if verify != "off" else None,
        meta.committed(NAMES),
    )
    segments = []
    if verify == "lazy":
        segments = [
            CheckedSegments(file, meta.segments[name], rows) for name, file in zip(names, files, strict=True)
        ]
        for checked, file in zip(segments[len(held) :], files[len(held) :], strict=True):
            if file.size <= _SMALL_BYTES:
                checked.look(0, file.size)
        if meta.committed(NAMES) <= _SMALL_BYTES:
            item_names.require_sound()
    return Mapped(
        [data.view(meta.dtype).view(rows, m.levels, m.width) for m, data in held.items()],
        factors or None,
        torch.from_numpy(read_present(folder, meta, compare=verify != "off")),
        item_names,
        read_frames(folder, meta),
        files,
        segments,
    )
