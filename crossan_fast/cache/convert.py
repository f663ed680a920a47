"""Rewriting a cache in another storage dtype: fp8 or int8 take half of bf16's room and memory traffic."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from crossan_fast.cache.folders import at_one_moment, whole_folder
from crossan_fast.cache.format import dtype_name, read_records, row_bytes, storage_dtype
from crossan_fast.cache.hidden_state_cache import HiddenStateCache
from crossan_fast.cache.quantize import dequantize
from crossan_fast.cache.validate import reject_nonfinite
from crossan_fast.cache.writer import CHUNK_BYTES, CacheWriter, to_storage


def convert_cache(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | torch.dtype,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Write the cache `source` to folder `out` with states stored as `dtype`, whole or not at all.

    Args:
        source: a complete cache of any dtype; it is only read.
        out: another folder; with `overwrite`, an existing cache there is replaced once the new one is
            complete.
        dtype: `fp32`, `fp16`, `bf16`, `fp8` (e4m3) or `int8`; the last two with a scale for each row and
            level.
        progress: called with the number of rows just converted, I + 1 for each modality in all.

    Returns:
        by modality, the error that conversion made relative to the states: ‖new − old‖ / ‖old‖ over all
        rows, in the Frobenius norm.

    Raises:
        as `HiddenStateCache.open`; ValueError where a value overflows `dtype` (the item is named) or `out` is
            `source`; FileExistsError where `out` is not empty.
    """
    source, out = Path(source), Path(out)
    storage = storage_dtype(dtype)
    if source.resolve() == out.resolve():
        raise ValueError(f"out: expected another folder than the cache that is read, got {out}")
    cache, records = at_one_moment(
        source, lambda meta: (HiddenStateCache.open(source), read_records(source, meta))
    )
    sources = {
        m.name: {**cache.sources.get(m.name, {}), "converted_from": dtype_name(cache.dtype)}
        for m in cache.modalities
    }
    errors = {}
    with (
        whole_folder(out, overwrite) as temporary,
        CacheWriter(
            temporary, cache.modalities, storage, cache.num_items, digests=records is not None
        ) as writer,
    ):
        for index, modality in enumerate(cache.modalities):
            errors[modality.name] = _convert_modality(cache, index, writer, storage, progress)
        if records is not None:
            writer.write_digests(records)
        writer.commit(list(cache.item_names[1:]), cache.present[1:], sources)
    return errors


def _convert_modality(
    cache: HiddenStateCache,
    index: int,
    writer: CacheWriter,
    storage: torch.dtype,
    progress: Callable[[int], object] | None,
) -> float:
    """Write every row of one modality as `storage`; the error made, as `convert_cache` returns it."""
    modality, names = cache.modalities[index], cache.item_names[1:]
    unread = torch.empty(0, dtype=torch.int64)  # rows are checked as they are converted
    states, scales = cache.states("cpu", unread)[index], cache.scales("cpu", unread)
    lost = kept = 0.0
    step = max(1, CHUNK_BYTES // row_bytes(modality, torch.float32))
    for start in range(0, cache.num_items + 1, step):
        old = states[start : start + step]
        old = old.float() if scales is None else dequantize(old, scales[index][start : start + step])
        reject_nonfinite(old, modality.name, names, start)
        stored, new_scales = to_storage(old, storage)
        if new_scales is None:  # scales fit every finite row
            kept_as = f" (once stored as {dtype_name(storage)})"
            reject_nonfinite(stored, modality.name, names, start, kept_as)
        new = stored.float() if new_scales is None else dequantize(stored, new_scales)
        lost += float(torch.linalg.vector_norm(new - old, dtype=torch.float64)) ** 2
        kept += float(torch.linalg.vector_norm(old, dtype=torch.float64)) ** 2
        writer.write(modality, range(start, start + len(old)), stored, new_scales)
        if progress is not None:
            progress(len(old))
    return (lost / kept) ** 0.5 if kept else 0.0
