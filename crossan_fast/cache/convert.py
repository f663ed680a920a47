"""Rewriting a cache: centred, as coordinates in a basis, fewer numbers a state, or in another storage dtype.

fp8 or int8 take half of bf16's room and memory traffic; a basis of k of D dimensions takes k / D of both, and
of a model's time. Several at once: states are centred first, then made coordinates, then stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast.cache.basis import (
    ENERGY,
    Chunks,
    asked_sizes,
    choose_basis,
    expand,
    level_energies,
    project,
)
from crossan_fast.cache.centring import Centring, choose_centring
from crossan_fast.cache.contents import read_records
from crossan_fast.cache.folders import at_one_moment, whole_folder
from crossan_fast.cache.format import Records, dtype_name, row_bytes, storage_dtype
from crossan_fast.cache.frame import Frame
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
    centre: bool | Collection[str] = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write the cache `source` to folder `out`, centred, in a basis, in another dtype, whole or not at all.

    Items that are appended to a cache that is centred or in a basis, or encoded again, land where its items
    are. A model of centred states is another than one of the states as they were: train it on them.

    Args:
        source: a complete cache of any dtype; it is only read. What is centred or in a basis stays so.
        out: another folder; with `overwrite`, an existing cache there is replaced once the new one is
            complete.
        dtype: `fp32`, `fp16`, `bf16`, `fp8` (e4m3) or `int8`; the last two with a scale for each row and
            level. None, with another change: as `source`.
        basis: how many dimensions to store states in, of every modality or by name: those that hold most
            energy of its states, see `crossan_fast.cache.basis`.
        energy: in place of `basis`, the share of energy that the least number of dimensions is to hold.
        centre: the modalities, or all (True), whose states get the mean over the items taken away and one
            size, each level by itself (`crossan_fast.cache.centring`).
        progress: called with the number of rows just gone through, I + 1 for each modality in all, and twice
            that before for each that gets a basis, and for each that is centred.

    Returns:
        by modality, the error that storing made relative to the states, once they are centred:
        ‖new − old‖ / ‖old‖ over all rows, in the Frobenius norm; of coordinates, that of the states they
        stand for. What a basis alone holds of each level is in the new cache's `sources`, as `energy`.

    Raises:
        as `HiddenStateCache.open`; ValueError where a value overflows `dtype` (the item is named), `out` is
            `source`, or a basis or centre cannot be had; FileExistsError where `out` is not empty.
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise ValueError(f"out: expected another folder than the cache that is read, got {out}")
    if dtype is None and basis is None and energy is None and not centre:
        raise ValueError("dtype, basis, energy, centre: expected at least one of them, got none")
    asked = None if dtype is None else storage_dtype(dtype)
    cache, records = _opened(source)
    sizes = asked_sizes(cache.modalities, cache.bases, basis, energy)
    to_centre = _to_centre(cache, centre)
    with whole_folder(out, overwrite) as temporary:
        fresh = {}
        for index, modality in enumerate(cache.modalities):
            name, centring, own = modality.name, None, None
            if name in to_centre:
                centring = choose_centring(_chunks(cache, index, progress, alone=True), modality, cache.dtype)
            if name in sizes:
                own = choose_basis(_chunks(cache, index, progress, centring), modality, sizes[name])
            if frame := Frame(centring, own):
                fresh[name] = frame
        return _write(temporary, cache, asked or cache.dtype, fresh, records, progress)


def _to_centre(cache: HiddenStateCache, centre: bool | Collection[str]) -> Collection[str]:
    """The names of modalities to centre, checked."""
    known = [m.name for m in cache.modalities]
    if isinstance(centre, str):
        raise TypeError(f"centre: expected true, false or a list of names, got {centre!r}")
    names = (known if centre else []) if isinstance(centre, bool) else list(centre)
    for name in names:
        if name not in known:
            raise ValueError(
                f"centre: unknown modality {name!r}, expected some of {known}{nearest(name, known)}"
            )
        if name in cache.frames:
            already = "centred" if cache.frames[name].centring else "stored in a basis"
            left = [other for other in known if other not in cache.frames]
            raise ValueError(
                f"centre: modality {name!r} is {already} already, expected some of {left}; convert the cache "
                "that it was made from"
            )
    return names


def expand_cache(
    source: str | os.PathLike[str], out: str | os.PathLike[str], before: Mapping[str, Frame]
) -> None:
    """Write the cache `source` to folder `out` in fp32, its states as they were kept in frames `before`.

    Of the encoders' states a basis holds a part; this is that part, as wide as they were: what a model that
    was trained on them can be judged on.

    Args:
        before: of the cache that `source` was converted from.
    """
    cache, _ = _opened(Path(source))
    added = {name: f.without(before.get(name, Frame())) for name, f in cache.frames.items()}
    modalities = [
        m if (basis := added.get(m.name, Frame()).basis) is None else replace(m, width=basis.shape[1])
        for m in cache.modalities
    ]
    with (
        whole_folder(out, overwrite=False) as temporary,
        CacheWriter(temporary, modalities, torch.float32, cache.num_items, frames=before) as writer,
    ):
        for index, modality in enumerate(modalities):
            frame = added.get(modality.name, Frame())
            for start, rows in _rows(cache, index):
                there = cache.present[start : start + len(rows), index, None, None]
                states = torch.where(there, frame.expand(rows), 0) if frame else rows
                writer.write(modality, range(start, start + len(rows)), states, None)
        writer.commit(list(cache.item_names[1:]), cache.present[1:], cache.sources)


def _opened(source: Path) -> tuple[HiddenStateCache, Records | None]:
    return at_one_moment(source, lambda meta: (HiddenStateCache.open(source), read_records(source, meta)))


def _rows(
    cache: HiddenStateCache,
    index: int,
    progress: Progress | None = None,
    centring: Centring | None = None,
    *,
    at_once: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """One modality's rows as finite fp32 `[n, L, D]`, `at_once` or more a time, each with its first row.

    Args:
        centring: of what the rows are, to be applied to those of items that have the modality.
    """
    modality, names = cache.modalities[index], cache.item_names[1:]
    step = max(at_once, CHUNK_BYTES // row_bytes(modality, torch.float32))
    for start in range(0, cache.num_items + 1, step):
        stop = min(start + step, cache.num_items + 1)
        asked = torch.arange(start, stop)  # looked at before they get checksums of their own
        rows, scales = cache.states("cpu", asked)[index][start:stop], cache.scales("cpu", asked)
        rows = rows.float() if scales is None else dequantize(rows, scales[index][start:stop])
        reject_nonfinite(rows, modality.name, names, start)
        if centring is not None:
            rows = torch.where(cache.present[start:stop, index, None, None], centring.apply(rows), 0)
        yield start, rows
        if progress is not None:
            progress(len(rows))


def _chunks(
    cache: HiddenStateCache,
    index: int,
    progress: Progress | None,
    centring: Centring | None = None,
    *,
    alone: bool = False,
) -> Chunks:
    """For `choose_basis`: D vectors at once or more, whose products cost more than adding these up.

    Args:
        alone: nothing of items that lack the modality, nor of the padding.
    """
    modality = cache.modalities[index]
    at_once = -(-modality.width // modality.levels)

    def chunks() -> Iterator[Tensor]:
        for start, rows in _rows(cache, index, progress, centring, at_once=at_once):
            yield rows[cache.present[start : start + len(rows), index]] if alone else rows

    return chunks


def _write(
    folder: Path,
    cache: HiddenStateCache,
    storage: torch.dtype,
    fresh: Mapping[str, Frame],
    records: Records | None,
    progress: Progress | None,
) -> dict[str, float]:
    """Write the whole of `cache` to `folder`, `fresh` frames applied; the errors made, by modality."""
    errors, sources = {}, {}
    modalities = [
        m if (basis := fresh.get(m.name, Frame()).basis) is None else replace(m, width=len(basis))
        for m in cache.modalities
    ]
    frames = {
        **cache.frames,
        **{name: frame.behind(cache.frames.get(name, Frame())) for name, frame in fresh.items()},
    }
    digests = records is not None
    with CacheWriter(folder, modalities, storage, cache.num_items, digests=digests, frames=frames) as writer:
        for index, modality in enumerate(modalities):
            name = modality.name
            frame = fresh.get(name, Frame())
            sources[name] = {**cache.sources.get(name, {}), "converted_from": dtype_name(cache.dtype)}
            rows = _rows(cache, index, progress, frame.centring)
            errors[name], shares = _convert_modality(cache, rows, writer, modality, storage, frame.basis)
            if frame.basis is not None:
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
