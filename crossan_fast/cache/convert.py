"""Rewriting a cache: in another storage dtype, or as coordinates in a basis, fewer numbers a state.

fp8 or int8 take half of bf16's room and memory traffic; a basis of k of D dimensions takes k / D of both, and
of a model's time. Both at once: coordinates first, then their dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crossan_fast.cache.basis import (
    ENERGY,
    Chunks,
    asked_sizes,
    choose_basis,
    expand,
    level_energies,
    project,
)
from crossan_fast.cache.contents import read_records
from crossan_fast.cache.folders import at_one_moment, whole_folder
from crossan_fast.cache.format import Records, dtype_name, row_bytes, storage_dtype
from crossan_fast.cache.hidden_state_cache import HiddenStateCache
from crossan_fast.cache.quantize import dequantize
from crossan_fast.cache.validate import reject_nonfinite
from crossan_fast.cache.writer import CHUNK_BYTES, CacheWriter, to_storage
from crossan_fast.config import Modality

Progress = Callable[[int], object]


def convert_cache(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    *,
    basis: int | Mapping[str, int] | None = None,
    energy: float | Mapping[str, float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write the cache `source` to folder `out`, in another dtype, a basis, or both, whole or not at all.

    Items that are appended to a cache in a basis, or encoded again, land in that basis.

    Args:
        source: a complete cache of any dtype; it is only read. What is in a basis stays in it.
        out: another folder; with `overwrite`, an existing cache there is replaced once the new one is
            complete.
        dtype: `fp32`, `fp16`, `bf16`, `fp8` (e4m3) or `int8`; the last two with a scale for each row and
            level. None, with a basis: as `source`.
        basis: how many dimensions to store states in, of every modality or by name: those that hold most
            energy of its states, see `crossan_fast.cache.basis`.
        energy: in place of `basis`, the share of energy that the least number of dimensions is to hold.
        progress: called with the number of rows just gone through, I + 1 for each modality in all, and twice
            that before for each that gets a basis.

    Returns:
        by modality, the error that conversion made relative to the states: ‖new − old‖ / ‖old‖ over all
        rows, in the Frobenius norm; of coordinates, that of the states they stand for. What a basis alone
        holds of each level is in the new cache's `sources`, as `energy`.

    Raises:
        as `HiddenStateCache.open`; ValueError where a value overflows `dtype` (the item is named), `out` is
            `source`, or a basis cannot be had; FileExistsError where `out` is not empty.
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise ValueError(f"out: expected another folder than the cache that is read, got {out}")
    if dtype is None and basis is None and energy is None:
        raise ValueError("dtype, basis, energy: expected at least one of them, got none")
    asked = None if dtype is None else storage_dtype(dtype)
    cache, records = _opened(source)
    sizes = asked_sizes(cache.modalities, cache.bases, basis, energy)
    with whole_folder(out, overwrite) as temporary:
        fresh = {
            modality.name: choose_basis(_chunks(cache, index, progress), modality, sizes[modality.name])
            for index, modality in enumerate(cache.modalities)
            if modality.name in sizes
        }
        return _write(temporary, cache, asked or cache.dtype, fresh, records, progress)


def expand_cache(source: str | os.PathLike[str], out: str | os.PathLike[str], names: Collection[str]) -> None:
    """Write the cache `source` to folder `out` in fp32, the modalities `names` without their bases.

    Of the encoders' states a basis holds a part; this is that part, as wide as they were: what a model that
    was trained on them can be judged on.
    """
    cache, _ = _opened(Path(source))
    bases = {name: basis for name, basis in cache.bases.items() if name not in names}
    modalities = [
        replace(m, width=cache.bases[m.name].shape[1]) if m.name in names else m for m in cache.modalities
    ]
    with (
        whole_folder(out, overwrite=False) as temporary,
        CacheWriter(temporary, modalities, torch.float32, cache.num_items, bases=bases) as writer,
    ):
        for index, modality in enumerate(modalities):
            for start, rows in _rows(cache, index):
                states = expand(rows, cache.bases[modality.name]) if modality.name in names else rows
                writer.write(modality, range(start, start + len(rows)), states, None)
        writer.commit(list(cache.item_names[1:]), cache.present[1:], cache.sources)


def _opened(source: Path) -> tuple[HiddenStateCache, Records | None]:
    return at_one_moment(source, lambda meta: (HiddenStateCache.open(source), read_records(source, meta)))


def _rows(
    cache: HiddenStateCache, index: int, progress: Progress | None = None, *, at_once: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """One modality's rows as finite fp32 `[n, L, D]`, `at_once` or more a time, each with its first row."""
    modality, names = cache.modalities[index], cache.item_names[1:]
    step = max(at_once, CHUNK_BYTES // row_bytes(modality, torch.float32))
    for start in range(0, cache.num_items + 1, step):
        stop = min(start + step, cache.num_items + 1)
        asked = torch.arange(start, stop)  # looked at before they get checksums of their own
        rows, scales = cache.states("cpu", asked)[index][start:stop], cache.scales("cpu", asked)
        rows = rows.float() if scales is None else dequantize(rows, scales[index][start:stop])
        reject_nonfinite(rows, modality.name, names, start)
        yield start, rows
        if progress is not None:
            progress(len(rows))


def _chunks(cache: HiddenStateCache, index: int, progress: Progress | None) -> Chunks:
    """For `choose_basis`: D vectors at once or more, whose products cost more than adding these up."""
    modality = cache.modalities[index]
    at_once = -(-modality.width // modality.levels)
    return lambda: (rows for _, rows in _rows(cache, index, progress, at_once=at_once))


def _write(
    folder: Path,
    cache: HiddenStateCache,
    storage: torch.dtype,
    fresh: Mapping[str, Tensor],
    records: Records | None,
    progress: Progress | None,
) -> dict[str, float]:
    """Write the whole of `cache` to `folder`, `fresh` bases applied; the errors made, by modality."""
    errors, sources = {}, {}
    modalities = [replace(m, width=len(fresh[m.name])) if m.name in fresh else m for m in cache.modalities]
    bases, digests = {**cache.bases, **fresh}, records is not None
    with CacheWriter(folder, modalities, storage, cache.num_items, digests=digests, bases=bases) as writer:
        for index, modality in enumerate(modalities):
            name = modality.name
            sources[name] = {**cache.sources.get(name, {}), "converted_from": dtype_name(cache.dtype)}
            rows = _rows(cache, index, progress)
            errors[name], shares = _convert_modality(cache, rows, writer, modality, storage, fresh.get(name))
            if name in fresh:
                sources[name][ENERGY] = shares
        if records is not None:
            writer.write_digests(records)
        writer.commit(list(cache.item_names[1:]), cache.present[1:], sources)
    return errors


def _convert_modality(
    cache: HiddenStateCache,
    rows: Iterator[tuple[int, Tensor]],
    writer: CacheWriter,
    modality: Modality,
    storage: torch.dtype,
    basis: Tensor | None,
) -> tuple[float, list[float]]:
    """Write every row.

    Returns:
        the error made, as `convert_cache` returns it, and the share of each level's energy that is kept as
        coordinates, 1 of a level of zeros.
    """
    names = cache.item_names[1:]
    lost, held, had = 0.0, torch.zeros(modality.levels).double(), torch.zeros(modality.levels).double()
    for start, old in rows:
        kept = old
        if basis is not None:
            kept = project(old, basis)
            reject_nonfinite(kept, modality.name, names, start, " (as coordinates)")
        stored, scales = to_storage(kept, storage)
        if scales is None:  # scales fit every finite row
            kept_as = f" (once stored as {dtype_name(storage)})"
            reject_nonfinite(stored, modality.name, names, start, kept_as)
        writer.write(modality, range(start, start + len(old)), stored, scales)
        new = stored.float() if scales is None else dequantize(stored, scales)
        if basis is not None:
            new = expand(new, basis)
        lost += float(torch.linalg.vector_norm(new - old, dtype=torch.float64)) ** 2
        held, had = held + level_energies(kept), had + level_energies(old)
    shares = torch.where(had > 0, held / had, 1).clamp(max=1).tolist()
    error = (lost / float(had.sum())) ** 0.5 if had.any() else 0.0
    return error, [round(share, 6) for share in shares]
