"""Writing a cache: rows in any order, one commit at the end, and nothing seen by readers before it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossan_fast._digests import hash_range
from crossan_fast._files import naming, sync_folder, write_whole
from crossan_fast.cache.contents import placed, require_segment
from crossan_fast.cache.folders import whole_folder
from crossan_fast.cache.format import (
    DIGESTS,
    META,
    NAMES,
    PRESENT,
    RECORD_BYTES,
    CacheError,
    CacheMeta,
    Records,
    Segment,
    basis_file,
    centre_file,
    dtype_name,
    is_quantized,
    row_bytes,
    scales_file,
    segment_ranges,
    states_file,
    storage_dtype,
)
from crossan_fast.cache.frame import Frame
from crossan_fast.cache.quantize import quantize
from crossan_fast.cache.validate import checked_present, checked_states, reject_nonfinite
from crossan_fast.config import Modality

# What is converted and checked in several steps should stay in the CPU's cache: 5 times faster than 64 MB.
CHUNK_BYTES = 2 << 20


def to_storage(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Floats `[n, L, D]` in the storage dtype, with scales `[n, L]` where it has them."""
    if is_quantized(dtype):
        return quantize(states, dtype)
    return states.to(dtype), None


class CacheWriter:
    """Writes one cache folder's data files: in place behind the bytes that its meta.json commits, or anew.

    All room is taken at the start, so that a full disk shows before hours of encoding. Callers see to it
    that there is one writer at a time (`locked`). Until `commit` returns, readers see the cache as it was, or
    none.

    Args:
        folder: made where missing.
        modalities, dtype, num_items: of the cache after the commit; `num_items` counts what `base` holds too.
        base: the cache being appended to; its files' bytes are never touched.
        anew: files of `base` (by name, without numbers) whose old rows change: they are copied under their
            next number first, which takes their room once more until `commit`.
        digests: whether the cache is to have records of its inputs; of `base`'s too, it is written anew.
        frames: by name, of a new cache's modalities that have one; `base` keeps its own.
        going_on: take the files as an earlier writer with the same arguments left them.

    Raises:
        OSError: no room; files are as they were.
        CacheError: `going_on`, and a file is not there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        modalities: Sequence[Modality],
        dtype: torch.dtype,
        num_items: int,
        base: CacheMeta | None = None,
        *,
        anew: Collection[str] = (),
        digests: bool = False,
        frames: Mapping[str, Frame] | None = None,
        going_on: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._base = base
        self._anew = {*anew, DIGESTS} & base.segments.keys() if base else set()
        versions = dict(base.versions) if base else {}
        versions |= {name: versions.get(name, 0) + 1 for name in self._anew}
        fresh = dict(frames or {})
        self._target = CacheMeta(
            storage_dtype(dtype),
            num_items,
            tuple(modalities),
            versions=versions,
            digests=digests,
            full_widths=base.full_widths
            if base
            else {name: frame.basis.shape[1] for name, frame in fresh.items() if frame.basis is not None},
            centred=base.centred
            if base
            else frozenset(name for name, frame in fresh.items() if frame.centring is not None),
        )
        self._target.check()
        self._descriptors: dict[str, int] = {}
        created = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if going_on:
                self._take_up()
            else:
                self._reserve()
            for modality in modalities:
                frame = fresh.get(modality.name, Frame())
                if frame.basis is not None:
                    self._put(basis_file(modality), _bytes(frame.basis), 0)
                if frame.centring is not None:
                    self._put(centre_file(modality), _bytes(frame.centring.packed()), 0)
        except BaseException:
            self.close()
            if created:
                shutil.rmtree(self.folder)
            raise

    @property
    def first_new_row(self) -> int:
        """The first row that is in no cache yet; 1 for a new cache."""
        return 1 + (self._base.num_items if self._base else 0)

    @property
    def files(self) -> set[str]:
        """Names on disk of the files that this writer writes."""
        return {self._target.file(name) for name in self._target.expected_bytes()}

    def write(self, modality: Modality, rows: Sequence[int], stored: Tensor, scales: Tensor | None) -> None:
        """Put `stored` `[n, L, D]` (storage dtype) and its scales at `rows`; any order, again is fine."""
        self._write_rows(states_file(modality), rows, stored)
        if scales is not None:
            self._write_rows(scales_file(modality), rows, scales)

    def write_absent(self, modality: Modality, rows: Sequence[int]) -> None:
        """Zeros at `rows`: what absent modalities and the padding row hold."""
        shape = (len(rows), modality.levels, modality.width)
        self.write(modality, rows, *to_storage(torch.zeros(shape), self._target.dtype))

    def write_old(self, modality: Modality, rows: Sequence[int]) -> None:
        """At `rows` of `base`, what they hold there."""
        for name in (states_file(modality), scales_file(modality)):
            if self._base is None or name not in self._anew:
                continue
            size = self._base.committed(name) // (self._base.num_items + 1)
            with open(self.folder / self._base.file(name), "rb") as file:
                for row in rows:
                    data = os.pread(file.fileno(), size, row * size)
                    self._put(name, data, row * size)

    def write_present(self, rows: Sequence[int], present: Tensor) -> None:
        """Flags `[n, M]` of `rows`."""
        self._write_rows(PRESENT, rows, present.to(torch.uint8))

    def write_digests(self, records: Records) -> None:
        """Records `[I + 1, M, 32]` of all rows."""
        self._put(DIGESTS, np.ascontiguousarray(records).reshape(-1).data, 0)

    def read_digests(self) -> Records:
        """As `write_digests` left them."""
        shape = (self._target.num_items + 1, len(self._target.modalities), RECORD_BYTES)
        return np.fromfile(self.folder / self._target.file(DIGESTS), np.uint8, math.prod(shape)).reshape(
            shape
        )

    def flush(self) -> None:
        """Return when what was written would survive a power cut."""
        for name, descriptor in self._descriptors.items():
            with naming(self.folder / self._target.file(name)):
                os.fsync(descriptor)

    def commit(
        self, names: Sequence[str], present: Tensor, sources: Mapping[str, Mapping[str, Any]]
    ) -> CacheMeta:
        """Make every row count: names `[n]` and present `[n, M]` of the new rows, in row order."""
        new = self._target.num_items + 1 - self.first_new_row
        if len(names) != new or present.shape != (new, len(self._target.modalities)):
            raise ValueError(
                f"names, present: expected {new} new items of {len(self._target.modalities)} modalities, "
                f"got {len(names)} names and present {list(present.shape)}"
            )
        text = "".join(f"{name}\n" for name in names).encode()
        names_start = self._base.committed(NAMES) if self._base else 0
        self._put(NAMES, text, names_start)
        self.write_present(range(self.first_new_row, self._target.num_items + 1), present)
        if self._base is None:
            self.write_present([0], torch.zeros(1, len(self._target.modalities)))
            for modality in self._target.modalities:
                self.write_absent(modality, [0])
        sizes = {
            name: names_start + len(text) if size is None else size
            for name, size in self._target.expected_bytes().items()
        }
        for name, size in sizes.items():
            with naming(self.folder / self._target.file(name)):
                os.ftruncate(self._descriptors[name], size)
        self.flush()
        sync_folder(self.folder)
        meta = dataclasses.replace(
            self._target,
            sources=sources,
            segments={name: self._segments(name, size) for name, size in sizes.items()},
            written_by={"python": platform.python_version(), "torch": torch.__version__},
        )
        write_whole(self.folder / META, meta.to_json())
        return meta

    def close(self) -> None:
        """Let go of the files and of the folder; uncommitted bytes stay behind the committed ones."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reserve(self) -> None:
        fresh = []
        try:
            for name, size in self._target.expected_bytes().items():
                path = self.folder / self._target.file(name)
                if name in self._anew:
                    path.unlink(missing_ok=True)  # of a writer that did not get to its commit
                if not path.exists():
                    fresh.append(path)
                self._descriptors[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                if size is not None:
                    with naming(path):
                        _allocate(self._descriptors[name], size)
            for name in self._anew:
                self._copy_old(name)
        except OSError as error:
            for name, descriptor in self._descriptors.items():
                if self._base is not None:
                    with contextlib.suppress(OSError):  # what lies behind the committed bytes is not read
                        os.ftruncate(descriptor, self._base.committed(name))
            for path in fresh:
                path.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            total = sum(size or 0 for size in self._target.expected_bytes().values())
            raise OSError(
                errno.ENOSPC,
                f"folder: no room in {self.folder} for {total / 1e9:.2f} GB; what was there is unchanged",
            ) from error

    def _take_up(self) -> None:
        for name, size in self._target.expected_bytes().items():
            path = self.folder / self._target.file(name)
            if not path.is_file() or path.stat().st_size < (size or 0):
                raise CacheError(
                    f"{path}: the stopped build's file is missing or short; begin anew with restart=True "
                    "(--restart)"
                )
            self._descriptors[name] = os.open(path, os.O_RDWR)

    def _copy_old(self, name: str) -> None:
        """What is written anew gets checksums of its own: damage would look sound from then on."""
        assert self._base is not None
        path = self.folder / self._base.file(name)
        with open(path, "rb") as file:
            for start, segment in placed(self._base.segments[name]):
                require_segment(file.fileno(), start, segment, path)
                for offset in range(start, start + segment.size, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, start + segment.size - offset)
                    self._put(name, os.pread(file.fileno(), size, offset), offset)

    def _write_rows(self, name: str, rows: Sequence[int], block: Tensor) -> None:
        if not len(rows):
            return
        first = 0 if self._base is None else 1 if name in self._anew else self.first_new_row
        if min(rows) < first or max(rows) > self._target.num_items:
            raise IndexError(f"rows: expected rows of this write, got {min(rows)} to {max(rows)}")
        size = block[0].numel() * block.element_size()
        data = block.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data
        if isinstance(rows, range) and rows.step == 1:
            self._put(name, data, rows.start * size)
            return
        for index, row in enumerate(rows):
            self._put(name, data[index * size : (index + 1) * size], row * size)

    def _put(self, name: str, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        with naming(self.folder / self._target.file(name)):
            while view:
                written = os.pwrite(self._descriptors[name], view, offset)
                view, offset = view[written:], offset + written

    def _segments(self, name: str, size: int) -> tuple[Segment, ...]:
        old = tuple(self._base.segments.get(name, ())) if self._base and name not in self._anew else ()
        path, descriptor = self.folder / self._target.file(name), self._descriptors[name]
        ranges = list(segment_ranges(sum(s.size for s in old), size))
        with ThreadPoolExecutor() as pool:  # hashing large blocks releases the interpreter's lock
            digests = list(pool.map(lambda r: hash_range(descriptor, r[0], r[1], path), ranges))
        return old + tuple(Segment(stop - start, d) for (start, stop), d in zip(ranges, digests, strict=True))


def write_cache(
    folder: str | os.PathLike[str],
    states: Mapping[str, Tensor],
    *,
    present: Tensor | None = None,
    item_names: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write states that are already computed as a cache folder, whole or not at all.

    Args:
        folder: made; with `overwrite`, an existing cache is replaced once the new one is complete.
        states: `{name: [I + 1, L, D_m]}` floats; row 0 is the padding, all zeros.
        present: bool `[I + 1, M]`; default: every item has every modality. States of absent ones are not
            kept.
        item_names: names of rows 1..I (or of 0..I, the first ''); default '1', '2', ….
        dtype: storage dtype (`fp32`, `fp16`, `bf16`, `fp8`, `int8`); default: that of the first tensor.
        sources: by name, how the states were made; JSON values, for people.

    Raises:
        ValueError, TypeError: shapes, dtypes or names do not fit, or a value of a present modality is NaN or
            inf (also if it overflows `dtype`); the item is named.
        FileExistsError: `folder` is not empty.
    """
    modalities, names = checked_states(states, item_names)
    flags = checked_present(present, modalities, len(names))
    storage = storage_dtype(dtype if dtype is not None else next(iter(states.values())).dtype)
    with (
        whole_folder(folder, overwrite) as temporary,
        CacheWriter(temporary, modalities, storage, len(names)) as writer,
    ):
        for column, modality in enumerate(modalities):
            write_in_chunks(writer, modality, states[modality.name], flags[:, column], storage, names)
        writer.commit(names, flags[1:], dict(sources or {}))


def write_in_chunks(
    writer: CacheWriter,
    modality: Modality,
    states: Tensor,
    present: Tensor,
    dtype: torch.dtype,
    names: Sequence[str],
) -> None:
    """Convert and write `[I + 1, L, D]` states a chunk of rows at a time; absent rows become zeros."""
    step = max(1, CHUNK_BYTES // row_bytes(modality, torch.float32))
    for start in range(1, len(names) + 1, step):
        stop = min(start + step, len(names) + 1)
        here = present[start:stop]
        block = torch.where(here[:, None, None], states[start:stop].cpu(), 0)
        reject_nonfinite(block, modality.name, names, start)
        stored, scales = to_storage(block, dtype)
        reject_nonfinite(stored, modality.name, names, start, f" (once stored as {dtype_name(dtype)})")
        writer.write(modality, range(start, stop), stored, scales)


def _bytes(numbers: Tensor) -> memoryview:
    return numbers.contiguous().numpy().reshape(-1).view(np.uint8).data


def _allocate(descriptor: int, size: int) -> None:
    """Grow a file to at least `size` bytes of zeros with room really taken, where the file system can."""
    if os.fstat(descriptor).st_size >= size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
