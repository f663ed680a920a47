"""A cache's files as they are read: what they hold, compared with the checksums of meta.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from crossan_fast._digests import hash_range
from crossan_fast.cache.centring import Centring
from crossan_fast.cache.format import (
    DIGESTS,
    NAMES,
    PRESENT,
    RECORD_BYTES,
    REMEDY,
    CacheMeta,
    CorruptCacheError,
    Records,
    Segment,
    basis_file,
    centre_file,
)
from crossan_fast.cache.frame import Frame


def read_committed(folder: Path, meta: CacheMeta, name: str, *, compare: bool = True) -> bytes:
    """The bytes of file `name` that count, compared with their checksums.

    What is derived from them, such as a cache with more items, would get checksums of its own and look sound.

    Args:
        compare: off: take them as they are.

    Raises:
        CorruptCacheError: they differ, or the file is short.
    """
    path = folder / meta.file(name)
    with open(path, "rb") as file:
        for start, segment in placed(meta.segments.get(name, ()) if compare else ()):
            require_segment(file.fileno(), start, segment, path)
        return file.read(meta.committed(name))


def read_names(folder: Path, meta: CacheMeta) -> list[str]:
    """The names of rows 1..I."""
    return names_in(read_committed(folder, meta, NAMES), meta.num_items, folder / NAMES)


def names_in(content: bytes, num_items: int, path: Path) -> list[str]:
    """The lines of items.txt; CorruptCacheError where they are not `num_items`, or no UTF-8."""
    try:
        names = content.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise CorruptCacheError(f"{path}: expected names in UTF-8, got {error}") from error
    if len(names) != num_items:
        raise CorruptCacheError(f"{path}: expected {num_items} lines, got {len(names)}")
    return names


def read_present(folder: Path, meta: CacheMeta, *, compare: bool = True) -> npt.NDArray[np.bool_]:
    """bool `[I + 1, M]`; CorruptCacheError also where a byte is neither 0 nor 1, or row 0's are not 0."""
    flags = np.frombuffer(read_committed(folder, meta, PRESENT, compare=compare), np.uint8)
    flags = flags.reshape(meta.num_items + 1, len(meta.modalities))
    if flags.max() > 1 or flags[0].any():
        row = int((flags > 1).any(axis=1).argmax())
        raise CorruptCacheError(
            f"{folder / meta.file(PRESENT)}: expected 0 or 1 for each item and modality, 0 for row 0, "
            f"got {flags[row].tolist()} for row {row}; {REMEDY}"
        )
    return flags.astype(np.bool_)


def read_records(folder: Path, meta: CacheMeta) -> Records | None:
    """What rows were made from, `[I + 1, M, 32]`; None where the cache does not say."""
    if not meta.digests:
        return None
    shape = (meta.num_items + 1, len(meta.modalities), RECORD_BYTES)
    return np.frombuffer(read_committed(folder, meta, DIGESTS), np.uint8).reshape(shape)


def read_frames(folder: Path, meta: CacheMeta) -> dict[str, Frame]:
    """By modality name, how those are kept that are not kept as their encoders gave them."""

    def numbers(name: str, rows: int) -> torch.Tensor:
        values = np.frombuffer(read_committed(folder, meta, name), "<f4")
        return torch.from_numpy(values.astype(np.float32)).view(rows, -1)

    frames = {}
    for modality in meta.modalities:
        centring = basis = None
        if modality.name in meta.centred:
            centring = Centring.unpacked(numbers(centre_file(modality), modality.levels))
        if modality.name in meta.full_widths:
            basis = numbers(basis_file(modality), modality.width)
        if frame := Frame(centring, basis):
            frames[modality.name] = frame
    return frames


def placed(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    """Each segment with the byte that it begins at."""
    start = 0
    for segment in segments:
        yield start, segment
        start += segment.size


def require_segment(descriptor: int, start: int, segment: Segment, path: Path, rows: str = "") -> None:
    """Raise CorruptCacheError unless an open file's segment that begins at `start` is what was written."""
    stop = start + segment.size
    try:
        sound = hash_range(descriptor, start, stop, path) == segment.sha256
    except EOFError as error:
        raise CorruptCacheError(f"{error}; {REMEDY}") from error
    if not sound:
        raise CorruptCacheError(
            f"{path}: its bytes differ from what was written, {start} to {stop - 1}{rows}; {REMEDY}"
        )
