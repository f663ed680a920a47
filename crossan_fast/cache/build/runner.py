"""Carrying out a build's passes: batches, reading ahead, broken inputs, the journal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from crossan_fast.cache.ahead import read_ahead
from crossan_fast.cache.build.inputs import BrokenInput
from crossan_fast.cache.build.journal import Journal
from crossan_fast.cache.build.passes import Items, Pass
from crossan_fast.cache.build.plan import BuildPlan
from crossan_fast.cache.format import CacheError, dtype_name
from crossan_fast.cache.validate import nonfinite_rows
from crossan_fast.cache.writer import CacheWriter, to_storage
from crossan_fast.config import Modality

UNREAD = "cannot be read any more"


class BrokenItemError(ValueError):
    """With `strict`: an item's input cannot be used."""


@dataclass(frozen=True)
class Settings:
    """How a plan is carried out.

    Attributes:
        batch_size: inputs encoded at once.
        device: of the encoders.
        compute_dtype: of their weights and arithmetic.
        strict: raise at the first input that cannot be used.
        progress: show a bar.
        journal_every: seconds of work that a kill may cost.
    """

    batch_size: int
    device: torch.device
    compute_dtype: torch.dtype
    strict: bool
    progress: bool
    journal_every: float


class Runner:
    """Carries out the passes of a plan, keeping the journal."""

    def __init__(
        self,
        plan: BuildPlan,
        items: Items,
        writer: CacheWriter,
        journal: Journal,
        settings: Settings,
        bar: tqdm[Any],
    ) -> None:
        self._plan, self._items, self._writer, self._journal = plan, items, writer, journal
        self._settings, self._bar = settings, bar
        self._saved = time.monotonic()

    def run(self, number: int) -> None:
        """Encode what the journal does not call done; journalled on the way out, however this ends."""
        work, done = self._plan.passes[number], self._journal.done[number]
        names = [m.name for m in work.modalities]
        if done.all():
            return
        todo = self._plan.changes.todo[number].nonzero()[0].tolist()
        absent = [k for k in todo if work.missing(self._plan.indices[k]) is not None]
        present = [k for k in todo if work.missing(self._plan.indices[k]) is None]
        self._bar.set_description(", ".join(names))
        work.load(self._settings.device, self._settings.compute_dtype)
        self._check_weights(number, work)
        self._write_absent(work, absent)
        done[absent] = True
        batches = _batches(present, work, self._plan.indices, self._settings.batch_size)
        # Planned over all items and skipped whole, so that a build that goes on makes the same batches.
        left = [batch for batch in batches if not done[batch].all()]
        positions = (k for batch in left for k in batch)
        inputs = read_ahead(
            positions,
            lambda k: self._read(work, k),
            depth=2 * self._settings.batch_size,
            threads=work.threads,
        )
        try:
            for batch in left:
                self._encode(work, batch, [result for _, result in islice(inputs, len(batch))])
                fresh = int((~done[batch]).sum())
                done[batch] = True
                self._bar.update(fresh)
                if time.monotonic() - self._saved >= self._settings.journal_every:
                    self._save()
        finally:
            inputs.close()
            self._save()
        work.unload()
        self._refuse_all_broken(number, names, len(present))

    def _read(self, work: Pass, k: int) -> Tensor | BrokenInput:
        try:
            return work.read(self._plan.indices[k])
        except BrokenInput as problem:
            return problem

    def _encode(self, work: Pass, batch: list[int], inputs: list[Tensor | BrokenInput]) -> None:
        positions, tensors, unusable = [], [], []
        for k, read in zip(batch, inputs, strict=True):
            for modality in work.modalities:
                # What was said of it before a stop: the file may have been mended since.
                self._journal.broken.get(modality.name, {}).pop(k, None)
                if isinstance(read, BrokenInput):
                    self._break(modality, k, str(read))
            if isinstance(read, BrokenInput):
                unusable.append(k)
            else:
                positions.append(k)
                tensors.append(read)
        self._leave(work.modalities, unusable)
        if not positions:
            return
        for modality, states in zip(work.modalities, work.encode(tensors), strict=True):
            bad = nonfinite_rows(states)
            stored, scales = to_storage(torch.where(bad[:, None, None], 0, states), self._plan.dtype)
            overflowed = nonfinite_rows(stored)
            for k, is_bad, is_over in zip(positions, bad.tolist(), overflowed.tolist(), strict=True):
                if is_bad:
                    self._break(modality, k, "NaN or inf in the encoder's output")
                elif is_over:
                    self._break(modality, k, f"the encoder's output overflows {dtype_name(self._plan.dtype)}")
            if overflowed.any():  # never of int8 and fp8, whose scales fit every row
                stored = torch.where(overflowed[:, None, None], 0, stored)
            self._writer.write(modality, [self._row(k) for k in positions], stored, scales)
            spoiled = (bad | overflowed).tolist()
            self._leave(
                [modality], [k for k, is_spoiled in zip(positions, spoiled, strict=True) if is_spoiled]
            )

    def _break(self, modality: Modality, k: int, reason: str) -> None:
        if self._settings.strict:
            name = self._items.names[self._plan.indices[k]]
            raise BrokenItemError(f"item {name!r}: modality {modality.name!r}: {reason}")
        self._journal.broken.setdefault(modality.name, {})[k] = reason

    def _write_absent(self, work: Pass, positions: list[int]) -> None:
        for modality in work.modalities:
            for start in range(0, len(positions), self._settings.batch_size):
                rows = [self._row(k) for k in positions[start : start + self._settings.batch_size]]
                self._writer.write_absent(modality, rows)

    def _leave(self, modalities: Sequence[Modality], positions: list[int]) -> None:
        """What cannot be encoded: an old row as it was, zeros in a new one."""
        rows = [self._row(k) for k in positions]
        old, new = (
            [r for r in rows if r <= self._plan.base_items],
            [r for r in rows if r > self._plan.base_items],
        )
        for modality in modalities:
            self._writer.write_old(modality, old)
            self._writer.write_absent(modality, new)

    def _row(self, k: int) -> int:
        return self._plan.changes.rows[k]

    def _save(self) -> None:
        self._writer.flush()  # rows first: a journal may lag behind them, never run ahead
        self._journal.write(self._writer.folder)
        self._saved = time.monotonic()

    def _check_weights(self, number: int, work: Pass) -> None:
        expected = {self._journal.fingerprints[number]} - {""}
        if self._plan.base is not None:
            expected |= {
                str(self._plan.base.sources[m.name].get("fingerprint", work.fingerprint))
                for m in work.modalities
            }
        if expected - {work.fingerprint}:
            raise CacheError(
                f"modality {work.modalities[0].name!r}: the encoder's weights differ from those that made "
                f"the rows in {self._writer.folder}; use the same checkpoint, or build a new cache"
            )
        self._journal.fingerprints[number] = work.fingerprint

    def _refuse_all_broken(self, number: int, names: list[str], inputs: int) -> None:
        """A wrong path or encoder, not broken inputs: nothing of this pass counts as done."""
        for name in names:
            broken = self._journal.broken.get(name, {})
            if self._plan.base is None and inputs and len(broken) == inputs:
                k, reason = next(iter(broken.items()))
                self._journal.done[number][:] = False
                for forgotten in names:
                    self._journal.broken.pop(forgotten, None)
                self._save()
                raise BrokenItemError(
                    f"modality {name!r}: none of {inputs} inputs can be used; item "
                    f"{self._items.names[self._plan.indices[k]]!r}: {reason}"
                )


def refuse_missing(plan: BuildPlan, items: Items, strict: bool) -> None:
    """Raise for items without any input where that is strict, or where a new cache's items all are."""
    if strict and plan.changes.unread:
        item, name = plan.changes.unread[0]
        raise BrokenItemError(f"item {item!r}: modality {name!r}: {UNREAD}")
    for work, todo in zip(plan.passes, plan.changes.todo, strict=True):
        chosen = [index for index, needed in zip(plan.indices, todo, strict=True) if needed]
        empty = [index for index in chosen if work.missing(index) is not None]
        name = work.modalities[0].name
        if empty and (strict or (plan.base is None and len(empty) == len(chosen))):
            raise BrokenItemError(
                f"item {items.names[empty[0]]!r}: modality {name!r}: {work.missing(empty[0])} "
                f"({len(empty)} of {len(chosen)} items)"
            )


def _batches(positions: list[int], work: Pass, indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches, longest first: running out of memory shows at once, and padding is least."""
    sizes = work.sizes([indices[k] for k in positions])
    order = sorted(zip(sizes, positions, strict=True), key=lambda pair: (-pair[0], pair[1]))
    batches: list[list[int]] = []
    last = None
    for size, k in order:
        if not batches or len(batches[-1]) == batch_size or (size != last and not work.mixes_sizes):
            batches.append([])
        batches[-1].append(k)
        last = size
    return batches
