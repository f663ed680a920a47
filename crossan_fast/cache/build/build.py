"""`build_cache`, from its arguments to the commit."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from crossan_fast._files import locked
from crossan_fast.cache.build.digests import HALF
from crossan_fast.cache.build.finish import BuildReport, Outcome, commit
from crossan_fast.cache.build.journal import Journal
from crossan_fast.cache.build.passes import FramedPass, Items, Pass, plan_passes
from crossan_fast.cache.build.plan import BuildPlan, existing_cache, specs_for
from crossan_fast.cache.build.runner import Runner, Settings, refuse_missing
from crossan_fast.cache.build.specs import ModalitySpec
from crossan_fast.cache.contents import read_frames
from crossan_fast.cache.folders import remove_leftovers
from crossan_fast.cache.format import BUILDING, NAMES, CacheMeta, check_item_names
from crossan_fast.cache.tiers import exact_device
from crossan_fast.cache.writer import CacheWriter

_COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_cache(
    items: Items,
    modalities: Sequence[ModalitySpec | str] | None,
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    compute_dtype: str | None = None,
    max_length: int | None = None,
    lowercase: bool | None = None,
    strict: bool = False,
    restart: bool = False,
    re_encode: str | Collection[str] = (),
    progress: bool = True,
    journal_every: float = 5.0,
) -> BuildReport:
    """Run frozen encoders over raw items once and keep the chosen layers' pooled states in folder `out`.

    Run again, it goes on, appends and encodes again what has changed: see `crossan_fast.cache.build`.

    Args:
        items: as `crossan_fast.data.items.read_items` returns.
        modalities: `ModalitySpec`s or their text form, in the order wanted; those that read the same column
            with the same encoder are served by one pass. None, for appending, takes the cache's own.
        out: a folder that is missing, empty, half-built, or a cache.
        dtype: storage: `fp32`, `fp16`, `bf16` (default), `fp8` or `int8`; in appending the cache's own.
        batch_size: inputs encoded at once.
        device: of the encoders; `auto` is CUDA where there is one.
        compute_dtype: of the encoders' weights and arithmetic: `fp32` (default), `fp16` or `bf16`; in
            appending the cache's own.
        max_length, lowercase: of texts, where a modality does not say (30, False); in appending as `dtype`.
        strict: raise at the first input that cannot be used; otherwise the item goes without the modality.
        restart: forget what a stopped build did.
        re_encode: names of items to encode again though nothing shows that their inputs changed, or `all`:
            for caches that do not say what their rows were made from. Other weights are refused.
        progress: show a bar with rate and time left, where the output is a terminal.
        journal_every: seconds of work that a kill may cost.

    Raises:
        BrokenItemError: with `strict`; and without, if no item at all has a usable input.
        CacheError: `out` holds a cache, or a stopped build, of other settings, or of other weights.
        FileExistsError: `out` holds something else.
        FileNotFoundError, ValueError, KeyError: an encoder, an option, a column or an item is not there;
            before anything is written.
        OSError: the disk is full; what was there is as it was.
    """
    begun, folder = time.monotonic(), Path(out)
    _check_arguments(items, batch_size, compute_dtype)
    base = existing_cache(folder)
    compute_dtype = compute_dtype or _compute_dtype_of(base)
    specs = specs_for(modalities, base, max_length, lowercase)
    passes = _in_frames(plan_passes(specs, items), folder, base)
    settings = Settings(batch_size, _device(device), _COMPUTE[compute_dtype], strict, progress, journal_every)
    plan = BuildPlan.make(specs, passes, items, base, folder, dtype, compute_dtype, re_encode)
    refuse_missing(plan, items, strict)
    outcome = _carry_out(folder, plan, items, settings, restart)
    report = outcome.report(folder, time.monotonic() - begun)
    outcome.warn(report, stacklevel=3)
    return report


def _check_arguments(items: Items, batch_size: int, compute_dtype: str | None) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if compute_dtype is not None and compute_dtype not in _COMPUTE:
        raise ValueError(f"compute_dtype: expected one of {', '.join(_COMPUTE)}, got {compute_dtype!r}")
    check_item_names(items.names)


def _in_frames(passes: Sequence[Pass], folder: Path, base: CacheMeta | None) -> list[Pass]:
    """Passes whose states are appended to the cache `base` as it stores them."""
    frames = {} if base is None else read_frames(folder, base)
    if base is None or not frames:
        return list(passes)
    return [FramedPass(work, frames, base.sources) for work in passes]


def _compute_dtype_of(base: CacheMeta | None) -> str:
    """What made the rows of `base`; the default where there is none, or it does not say."""
    own = [source.get("compute_dtype") for source in base.sources.values()] if base else []
    return next((dtype for dtype in own if dtype in _COMPUTE), "fp32")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return exact_device(device)


def _carry_out(folder: Path, plan: BuildPlan, items: Items, settings: Settings, restart: bool) -> Outcome:
    """Do what is planned, alone in the folder, going on where a build of the same plan was stopped."""
    with locked(folder):
        if existing_cache(folder) != plan.base:
            raise BlockingIOError(f"folder: another process has just written to {folder}; run again")
        found = None if restart else Journal.read(folder)
        # A journal of another base is of a build that was committed and stopped just before removing it; one
        # with nothing done binds nobody.
        if found is not None and (found.base != plan.base_key or not found.begun):
            found = None
        if plan.indices:
            return _encode(folder, plan, items, settings, found)
        outcome = Outcome(plan, items, None)
        outcome.write_report(folder)
        if found is None and plan.base is not None:
            (folder / BUILDING).unlink(missing_ok=True)
            remove_leftovers(folder, plan.base)
    return outcome


def _encode(
    folder: Path, plan: BuildPlan, items: Items, settings: Settings, found: Journal | None
) -> Outcome:
    """Carry a plan out, going on with the journal `found`, to the commit."""
    fresh = plan.base is None and not (folder / NAMES).exists()
    journal = found or Journal.fresh(plan.digest, plan.base_key, plan.changes.todo)
    if found is not None:
        found.check_plan(plan.digest, plan.changes.todo, folder)
    else:
        journal.write(folder)
        remove_leftovers(folder, plan.base)
    try:
        writer = CacheWriter(
            folder,
            plan.modalities,
            plan.dtype,
            plan.num_items,
            plan.base,
            anew=plan.anew,
            digests=True,
            going_on=found is not None,
        )
    except OSError:
        if not journal.begun:
            (folder / BUILDING).unlink()
        if fresh and not any(folder.iterdir()):
            shutil.rmtree(folder)
        raise
    with writer, _bar(plan, journal, settings.progress) as bar:
        if found is not None:
            _forget_changed(plan, journal, writer)
            journal.write(folder)  # before the new records: they would make old rows look done
        writer.write_digests(plan.changes.records)
        runner = Runner(plan, items, writer, journal, settings, bar)
        for number in range(len(plan.passes)):
            runner.run(number)
        outcome = Outcome(plan, items, journal)
        commit(folder, plan, outcome, writer, journal)
    return outcome


def _forget_changed(plan: BuildPlan, journal: Journal, writer: CacheWriter) -> None:
    """Inputs that are not what they were when the stopped build began do not count as done."""
    rows, then = plan.changes.rows, writer.read_digests()
    column_of = {m.name: column for column, m in enumerate(plan.modalities)}
    for work, todo, done in zip(plan.passes, plan.changes.todo, journal.done, strict=True):
        for modality in work.modalities:
            at = (rows, column_of[modality.name], slice(0, HALF))
            done &= ~(todo & (then[at] != plan.changes.records[at]).any(axis=1))


def _bar(plan: BuildPlan, journal: Journal, progress: bool) -> tqdm[Any]:
    total = missing = 0
    for work, todo in zip(plan.passes, plan.changes.todo, strict=True):
        chosen = [index for index, needed in zip(plan.indices, todo, strict=True) if needed]
        total += len(chosen)
        missing += sum(work.missing(index) is not None for index in chosen)
    done = int(sum(done.sum() for done in journal.done)) - journal.spared
    return tqdm(
        total=total - missing,
        initial=min(done, total - missing),
        unit="item",
        disable=None if progress else True,
    )
