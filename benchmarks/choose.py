"""`choose`: which backend runs each pass of an op on a GPU, by its rows, for the dispatcher's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row
from benchmarks.targets import Rows, kinds
from crossan_fast.ops import _passes
from crossan_fast.ops._passes import Passes

DTYPE = "bf16"  # what training computes in on a GPU
CASES = {"side_network": tuple(f"side_network/N={n},M=4,D=768,L=7,r=64" for n in (704, 20_314))}


def write(files: Sequence[Path]) -> list[str]:
    """Decide for every GPU among the files and record it; a line for each decision.

    Raises:
        ValueError: no file has rows of a GPU, or one lacks a row that a decision needs, named.
    """
    said = []
    for path in files:
        rows = results.latest(results.read(path))
        if not rows or "cuda" not in kinds(gpu := next(iter(rows.values())).device):
            continue
        for op in CASES:
            passes = decide(op, rows)
            _passes.record(gpu, op, passes)
            said.append(
                f"{gpu}: {op}: forward {passes.forward}, backward {passes.backward} ({passes.reason})"
            )
    if not said:
        raise ValueError(f"expected a file with rows of a GPU, got {[str(path) for path in files]}")
    return said


def decide(op: str, rows: Rows) -> Passes:
    """The backend of each pass whose times have the least product over the cases.

    Raises:
        ValueError: a missing row, named; rows of several commits.
    """
    picked, told, commits = {}, [], set()
    for part in ("forward", "backward"):
        found = {b: [_row(rows, case, b, part) for case in CASES[op]] for b in _passes.SHARED[op]}
        commits |= {row.commit for timed in found.values() for row in timed}
        picked[part] = min(found, key=lambda b: math.prod(row.p50_ms for row in found[b]))
        figures = (f"{b} {' and '.join(f'{row.p50_ms:.3g}' for row in found[b])}" for b in found)
        told.append(f"{part} {', '.join(figures)}")
    if len(commits) > 1:
        raise ValueError(f"{op}: expected rows of one commit, got {sorted(commits)}")
    reason = f"measured in {DTYPE} at 704 and 20,314 items, commit {commits.pop()}, ms: {'; '.join(told)}"
    return Passes(picked["forward"], picked["backward"], reason)


def _row(rows: Rows, case: str, backend: str, part: str) -> Row:
    """Of the captured call, which is what training runs, or else of the plain one."""
    for name in (f"{backend}-graph", backend):
        if row := rows.get((case, DTYPE, name, part)):
            return row
    raise ValueError(f"expected a row of {case} {DTYPE} {backend} {part}, got none; measure it first")
