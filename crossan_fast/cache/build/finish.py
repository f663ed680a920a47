"""The end of a build: what is present, what is known of inputs, the commit, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from crossan_fast._files import write_whole
from crossan_fast.cache.build.journal import Journal
from crossan_fast.cache.build.passes import Items
from crossan_fast.cache.build.plan import BuildPlan
from crossan_fast.cache.build.runner import UNREAD
from crossan_fast.cache.folders import remove_leftovers
from crossan_fast.cache.format import BUILDING, REPORT
from crossan_fast.cache.writer import CacheWriter

_KEPT = "; its earlier state is kept"


@dataclass(frozen=True)
class BuildReport:
    """What `build_cache` did.

    Attributes:
        folder: of the cache.
        num_items: I of the cache now.
        added: items encoded by this build, those of its earlier, stopped runs included.
        not_listed: items that the cache had before and the items file does not name; they are kept.
        broken: by modality, how many of the added items lack it; `report.tsv` says why.
        bare: added or changed items that have no modality at all: no run trains on them or recommends them.
        seconds: this run took.
        unchanged: items of the cache that the items file names and whose rows are as they were.
        re_encoded: by modality, how many rows of the cache were encoded again.
        emptied: by modality, how many items of the cache have it no longer: their cells are empty now.
        kept: by modality, how many inputs changed, or were to be encoded again, but cannot be used: their
            rows are as they were; `report.tsv` says why.
        unknown: items of the cache of whose inputs nothing is known, so that a change cannot be told.
    """

    folder: Path
    num_items: int
    added: int
    not_listed: int
    broken: Mapping[str, int]
    bare: int
    seconds: float
    unchanged: int = 0
    re_encoded: Mapping[str, int] = field(default_factory=dict)
    emptied: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    unknown: int = 0


class Outcome:
    """What came of a plan's encodings, gathered from the journal.

    Attributes:
        names: of the plan's items.
        present: bool `[n, M]` of them.
    """

    def __init__(self, plan: BuildPlan, items: Items, journal: Journal | None) -> None:
        self._plan = plan
        self.names = [items.names[index] for index in plan.indices]
        self._column_of = {m.name: column for column, m in enumerate(plan.modalities)}
        self._handled: set[tuple[str, str]] = set()
        self._absent: dict[tuple[str, str], str] = {}
        self._kept = dict.fromkeys(plan.changes.unread, UNREAD)
        self._re_encoded, self._emptied = dict.fromkeys(self._column_of, 0), dict.fromkeys(self._column_of, 0)
        self.present = torch.ones(len(self.names), len(plan.modalities), dtype=torch.bool)
        self.present[: plan.old] = torch.from_numpy(plan.before.present[plan.changes.rows[: plan.old]])
        for number, work in enumerate(plan.passes if journal is not None else ()):
            assert journal is not None
            for modality in work.modalities:
                broken = journal.broken.get(modality.name, {})
                for k in np.flatnonzero(plan.changes.todo[number]).tolist():
                    self._add(modality.name, k, work.missing(plan.indices[k]), broken.get(k))

    def _add(self, name: str, k: int, missing: str | None, broken: str | None) -> None:
        column, is_old = self._column_of[name], k < self._plan.old
        self._handled.add((self.names[k], name))
        had = is_old and bool(self.present[k, column])
        if missing is None and broken is not None and had:
            self._kept[self.names[k], name] = broken
            return
        reason = missing or broken
        self.present[k, column] = reason is None
        if reason is not None:
            self._absent[self.names[k], name] = reason
            self._emptied[name] += had
        elif is_old:
            self._re_encoded[name] += 1

    def write_report(self, folder: Path) -> None:
        """Bring report.tsv up to date: item, modality, reason; one line for each."""
        lines = _read_report(folder / REPORT)
        lines = {key: why for key, why in lines.items() if key not in self._handled and why != UNREAD + _KEPT}
        lines |= self._absent | {key: reason + _KEPT for key, reason in self._kept.items()}
        body = "".join(f"{item}\t{name}\t{' '.join(why.split())}\n" for (item, name), why in lines.items())
        text = "item\tmodality\treason\n" + body
        there = (folder / REPORT).read_bytes() if (folder / REPORT).is_file() else b""
        if text.encode() != there and (lines or there):
            write_whole(folder / REPORT, text)

    def report(self, folder: Path, seconds: float) -> BuildReport:
        """What to tell the caller."""
        plan, changes = self._plan, self._plan.changes
        new = self.present[plan.old :]
        kept = [name for _, name in self._kept]
        return BuildReport(
            folder,
            plan.num_items,
            len(new),
            plan.base_items - changes.listed,
            {name: int((~new[:, column]).sum()) for name, column in self._column_of.items()},
            int((~self.present.any(dim=1)).sum()),
            seconds,
            changes.listed - plan.old,
            self._re_encoded,
            self._emptied,
            {name: kept.count(name) for name in self._column_of},
            changes.unknown,
        )

    def warn(self, report: BuildReport, stacklevel: int) -> None:
        """Say what could not be used."""
        where = report.folder / REPORT
        if any(report.broken.values()) or report.bare:
            counts = ", ".join(f"{count} lack {name!r}" for name, count in report.broken.items() if count)
            bare = f"{report.bare} have no modality at all: no run uses them" if report.bare else ""
            said = "; ".join(part for part in (counts, bare) if part)
            warnings.warn(f"of {len(self.names)} items {said}; see {where}", stacklevel=stacklevel)
        if self._kept:
            (item, name), reason = next(iter(self._kept.items()))
            counts = ", ".join(f"{count} of {kind!r}" for kind, count in report.kept.items() if count)
            warnings.warn(
                f"{counts}: inputs that changed cannot be used, and their earlier states are kept; first "
                f"item {item!r}, {name!r}: {reason}; see {where}",
                stacklevel=stacklevel,
            )


def commit(folder: Path, plan: BuildPlan, outcome: Outcome, writer: CacheWriter, journal: Journal) -> None:
    """Make the plan's rows count, then remove what no longer does."""
    for number, work in enumerate(plan.passes):
        for modality in work.modalities:
            before = plan.base.sources[modality.name].get("fingerprint", "") if plan.base else ""
            plan.records[modality.name]["fingerprint"] = journal.fingerprints[number] or before
    outcome.write_report(folder)
    writer.write_present(plan.changes.rows[: plan.old], outcome.present[: plan.old])
    meta = writer.commit(outcome.names[plan.old :], outcome.present[plan.old :], plan.records)
    remove_leftovers(folder, meta)
    (folder / BUILDING).unlink()


def _read_report(path: Path) -> dict[tuple[str, str], str]:
    """Reasons by item and modality; people may have edited the file, and nothing in it may stop a build."""
    lines: dict[tuple[str, str], str] = {}
    if path.is_file():
        # Only "\n" ends a line: a name may hold the other characters that str.splitlines breaks at.
        for line in path.read_bytes().decode("utf-8", errors="replace").split("\n")[1:]:
            item, _, rest = line.partition("\t")
            modality, tab, reason = rest.partition("\t")
            if tab:
                lines[item, modality] = reason
    return lines
