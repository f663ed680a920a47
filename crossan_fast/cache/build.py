"""Building a cache from raw items: each encoder runs once, frozen; stopped builds go on; new items append."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from crossan_fast.cache.format import BUILDING, NAMES, REPORT, check_item_names, write_atomically
from crossan_fast.cache.journal import Journal
from crossan_fast.cache.passes import Items, plan_passes
from crossan_fast.cache.plan import BuildPlan, existing_cache, specs_for
from crossan_fast.cache.runner import Runner, refuse_missing
from crossan_fast.cache.specs import ModalitySpec
from crossan_fast.cache.tiers import exact_device
from crossan_fast.cache.writer import CacheWriter, locked

_COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuildReport:
    """What `build_cache` did.

    Attributes:
        folder: of the cache.
        num_items: I of the cache now.
        added: items encoded by this build, those of its earlier, stopped runs included.
        not_listed: items that the cache had before and the items file does not name; they are kept.
        broken: by modality, how many of the added items lack it; `report.tsv` says why.
        bare: added items that have no modality at all; a model refuses them.
        seconds: this run took.
    """

    folder: Path
    num_items: int
    added: int
    not_listed: int
    broken: Mapping[str, int]
    bare: int
    seconds: float


def build_cache(
    items: Items,
    modalities: Sequence[ModalitySpec | str] | None,
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    compute_dtype: str | None = None,
    max_length: int = 30,
    lowercase: bool = False,
    strict: bool = False,
    restart: bool = False,
    progress: bool = True,
    journal_every: float = 5.0,
) -> BuildReport:
    """Run frozen encoders over raw items once and keep the chosen layers' pooled states in folder `out`.

    Run again with the same arguments, it goes on where it was stopped; with more items, it encodes the new
    ones and appends them: rows keep their items. An item that the cache has already is not encoded again,
    even if its inputs changed. Items are encoded in batches sorted by length, so the result does not depend
    on where a build was stopped, bit for bit, at the same batch size.

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
        max_length, lowercase: of texts, where a modality does not say.
        strict: raise at the first input that cannot be used; otherwise the item goes without the modality.
        restart: forget what a stopped build did.
        progress: show a bar with rate and time left.
        journal_every: seconds of work that a kill may cost.

    Raises:
        BrokenItemError: with `strict`; and without, if no item at all has a usable input.
        CacheError: `out` holds a cache, or a stopped build, of other settings.
        FileExistsError: `out` holds something else.
        FileNotFoundError, ValueError: an encoder, an option or a column is not there; before anything is
            written.
        OSError: the disk is full; what was there is as it was.
    """
    begun = time.monotonic()
    folder = Path(out)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if compute_dtype is not None and compute_dtype not in _COMPUTE:
        raise ValueError(f"compute_dtype: expected one of {', '.join(_COMPUTE)}, got {compute_dtype!r}")
    check_item_names(items.names)
    base = existing_cache(folder)
    if compute_dtype is None:
        own = [source.get("compute_dtype") for source in base.sources.values()] if base else []
        compute_dtype = next((dtype for dtype in own if dtype in _COMPUTE), "fp32")
    specs = specs_for(modalities, base)
    passes = plan_passes(specs, items, max_length, lowercase)
    plan = BuildPlan.make(specs, passes, items, base, folder, dtype, compute_dtype)
    if not plan.indices:
        nothing = dict.fromkeys(plan.records, 0)
        return BuildReport(folder, plan.base_items, 0, plan.not_listed, nothing, 0, time.monotonic() - begun)
    refuse_missing(plan, items, strict)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = exact_device(device)
    with locked(folder):
        if existing_cache(folder) != base:
            raise BlockingIOError(f"folder: another process has just written to {folder}; run again")
        journal = _journal(folder, plan, restart)
        fresh = base is None and not (folder / NAMES).exists()
        try:
            writer = CacheWriter(folder, plan.modalities, plan.dtype, plan.num_items, base)
        except OSError:
            if not any(done.any() for done in journal.done):
                (folder / BUILDING).unlink()
            if fresh and not any(folder.iterdir()):
                shutil.rmtree(folder)
            raise
        with writer, _bar(plan, journal, progress) as bar:
            runner = Runner(plan, items, writer, journal, batch_size, strict, journal_every, bar)
            for number in range(len(plan.passes)):
                runner.run(number, device, _COMPUTE[compute_dtype])
            return _commit(folder, plan, items, writer, journal, begun)


def _journal(folder: Path, plan: BuildPlan, restart: bool) -> Journal:
    found = None if restart else Journal.read(folder)
    # A journal of another base is of a build that was committed and stopped just before removing it; one with
    # nothing done binds nobody.
    if found is not None and found.base_items == plan.base_items and any(done.any() for done in found.done):
        found.check_plan(plan.digest, folder)
        return found
    journal = Journal.fresh(plan.digest, plan.base_items, len(plan.passes), len(plan.indices))
    journal.write(folder)
    return journal


def _bar(plan: BuildPlan, journal: Journal, progress: bool) -> tqdm[Any]:
    total = len(plan.passes) * len(plan.indices)
    missing = sum(work.missing(index) is not None for work in plan.passes for index in plan.indices)
    done = int(sum(done.sum() for done in journal.done))
    return tqdm(total=total - missing, initial=min(done, total - missing), unit="item", disable=not progress)


def _commit(
    folder: Path, plan: BuildPlan, items: Items, writer: CacheWriter, journal: Journal, begun: float
) -> BuildReport:
    names = [items.names[index] for index in plan.indices]
    present = torch.ones(len(names), len(plan.modalities), dtype=torch.bool)
    reasons: dict[tuple[str, str], str] = {}
    column_of = {m.name: column for column, m in enumerate(plan.modalities)}
    for number, work in enumerate(plan.passes):
        for modality in work.modalities:
            plan.records[modality.name]["fingerprint"] = journal.fingerprints[number]
            broken = journal.broken.get(modality.name, {})
            for k, index in enumerate(plan.indices):
                reason = work.missing(index) or broken.get(k)
                if reason is not None:
                    present[k, column_of[modality.name]] = False
                    reasons[names[k], modality.name] = reason
    _write_report(folder, reasons)
    writer.commit(names, present, plan.records)
    (folder / BUILDING).unlink()
    report = BuildReport(
        folder,
        plan.num_items,
        len(names),
        plan.not_listed,
        {m.name: int((~present[:, column_of[m.name]]).sum()) for m in plan.modalities},
        int((~present.any(dim=1)).sum()),
        time.monotonic() - begun,
    )
    if reasons:
        counts = ", ".join(f"{count} lack {name!r}" for name, count in report.broken.items() if count)
        bare = f"; {report.bare} have no modality at all, which a model refuses" if report.bare else ""
        warnings.warn(f"of {len(names)} items {counts}{bare}; see {folder / REPORT}", stacklevel=3)
    return report


def _write_report(folder: Path, reasons: Mapping[tuple[str, str], str]) -> None:
    """Add to report.tsv: item, modality, reason; one line for each."""
    lines: dict[tuple[str, str], str] = {}
    if (folder / REPORT).is_file():
        for line in (folder / REPORT).read_text(encoding="utf-8").splitlines()[1:]:
            item, modality, reason = line.split("\t", 2)
            lines[item, modality] = reason
    lines |= {key: " ".join(reason.split()) for key, reason in reasons.items()}
    body = "".join(f"{item}\t{modality}\t{reason}\n" for (item, modality), reason in lines.items())
    write_atomically(folder / REPORT, "item\tmodality\treason\n" + body)
