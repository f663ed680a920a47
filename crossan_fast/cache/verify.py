"""Reading every byte of a cache and comparing it with what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crossan_fast._digests import hash_range
from crossan_fast.cache.contents import placed
from crossan_fast.cache.folders import at_one_moment
from crossan_fast.cache.format import (
    DIGESTS,
    NAMES,
    PRESENT,
    RECORD_BYTES,
    CacheMeta,
    Segment,
    is_quantized,
    row_bytes,
    scales_file,
    states_file,
)


def verify_cache(
    folder: str | os.PathLike[str], progress: Callable[[int], object] | None = None
) -> list[str]:
    """Compare each segment of each file with its SHA-256; one line for each damaged one, none for a sound
    cache.

    Args:
        folder: of the cache.
        progress: called with the bytes just read.

    Raises:
        as `HiddenStateCache.open`, where meta.json itself, or a file's size, is wrong.
    """
    folder = Path(folder)
    return at_one_moment(folder, lambda meta: _compare(folder, meta, progress))


def _compare(folder: Path, meta: CacheMeta, progress: Callable[[int], object] | None) -> list[str]:
    row_sizes = _row_sizes(meta)
    jobs = [(name, *place) for name, segments in meta.segments.items() for place in placed(segments)]

    def check(job: tuple[str, int, Segment]) -> str | None:
        name, start, segment = job
        path, stop = folder / meta.file(name), start + segment.size
        try:
            with open(path, "rb") as file:
                digest = hash_range(file.fileno(), start, stop, path)
        except EOFError as error:  # cut since the sizes were compared
            return str(error)
        if progress is not None:
            progress(segment.size)
        if digest == segment.sha256:
            return None
        rows = ""
        if name in row_sizes and stop > start:
            rows = f" (rows {start // row_sizes[name]} to {(stop - 1) // row_sizes[name]})"
        return f"{meta.file(name)}: bytes {start} to {stop - 1}{rows} differ from what was written"

    with ThreadPoolExecutor() as pool:  # hashing large blocks releases the interpreter's lock
        return [problem for problem in pool.map(check, jobs) if problem is not None]


def total_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that `verify_cache` will read."""
    return at_one_moment(Path(folder), lambda meta: sum(map(meta.committed, meta.segments)))


def _row_sizes(meta: CacheMeta) -> dict[str, int]:
    sizes = {PRESENT: len(meta.modalities), DIGESTS: len(meta.modalities) * RECORD_BYTES}
    for modality in meta.modalities:
        sizes[states_file(modality)] = row_bytes(modality, meta.dtype)
        if is_quantized(meta.dtype):
            sizes[scales_file(modality)] = modality.levels * 4
    assert NAMES not in sizes  # its lines differ in length
    return sizes
