"""Count what a training step launches on a GPU, and check every launch of Triton's, without a GPU.

    python -m benchmarks.launches [--only iisan] [--check] [--count]

A whole step (forward, backward, clipping, AdamW) runs on tensors that lie on cuda:0 for torch: its ops
compute on the CPU, Triton's kernels compile for sm_90 and are launched into a driver that keeps launches and
has them checked (`benchmarks/pretended_gpu`). The second step counts, as a captured one would. An op of
torch's that writes something is at least one kernel on a device; a sort or a scan is several. Counts go to
benchmarks/results/launches.csv; `--check` writes nothing and fails where they are not what is recorded.
`--count` compiles and checks nothing, which takes seconds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

import crossan_fast._losses
import crossan_fast.model
import crossan_fast.training.step
from benchmarks.pretended_gpu import GPU, PretendedGpu, observers
from benchmarks.pretended_gpu.driver import Launch, pretended_driver
from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, ops
from crossan_fast._files import write_whole
from crossan_fast.training import OptimizerConfig, TrainStep, make_optimizer
from crossan_fast.training.train_config import ComputePrecision

RESULTS = Path(__file__).parent / "results" / "launches.csv"
WINDOW, USERS, CATALOGUE = 10, 64, 20_314
SOME = 2_000  # items of a catalogue that no step encodes whole
# Allocations, and new names for memory there is.
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}
_NO_KERNEL |= {"_unsafe_view", "_reshape_alias"}
# The host waits for the device to know a number, or a shape.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        precision: `bf16` is under autocast.
        missing: some items lack modalities.
    """

    name: str
    config: CrossanConfig
    precision: ComputePrecision = "bf16"
    users: int = USERS
    items: int = SOME
    missing: bool = False


@dataclass(frozen=True)
class Row:
    """What one part of a step launches in one pass (`forward`, `backward` or `update`)."""

    torch: str
    triton: str
    case: str
    precision: str
    part: str
    passes: str
    triton_launches: int
    torch_ops: int


_KINDS: list[Callable[[str], Any]] = [int if f.type == "int" else str for f in fields(Row)]
_HEADER = ["pass" if f.name == "passes" else f.name for f in fields(Row)]


def paper(modalities: int = 4, **options: Any) -> CrossanConfig:
    names = ("text", "image", "video", "audio")[:modalities]
    made = CrossanConfig.iisan if modalities == 2 else CrossanConfig
    return made(tuple(Modality(name, 768, 7) for name in names), window=WINDOW, **options)


CASES = (
    Case("M=4,D=768,L=7,loss=in_batch", paper()),
    Case("M=4,D=768,L=7,loss=in_batch", paper(), "fp32"),
    Case("M=4,D=768,L=7,loss=in_batch,missing", paper(modality_dropout=0.2), missing=True),
    Case("M=4,D=768,L=7,loss=full", paper(loss="full"), items=CATALOGUE),
    Case("M=2,D=768,L=7,architecture=iisan,loss=in_batch", paper(2)),
)


@dataclass
class Parts:
    """Sorts launches and ops by the part of the step that they belong to.

    Attributes:
        counts: by part, pass, and `triton` or `torch`.
        waits: ops for which the host waits for the device.
    """

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    _current: str = "model"
    _spans: list[tuple[int, int, str]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """In the place of the package's own ranges for profilers."""
        before, self._current = self._current, name
        first = torch._C._autograd._get_sequence_nr()
        try:
            yield
        finally:
            self._spans.append((first, torch._C._autograd._get_sequence_nr(), name))
            self._current = before

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` in a span of its own."""

        @functools.wraps(function)
        def spanned(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return spanned

    def op(self, function: Any, on_gpu: bool) -> None:
        """See `pretended_gpu.observers`."""
        name = function._schema.name.partition("::")[2]
        if name in _WAITS or not on_gpu:
            self.waits.append(name)
        elif name not in _NO_KERNEL and not function.is_view:
            self._count("torch")

    def launched(self, launch: Launch) -> None:
        self._count("triton")

    def _count(self, kind: str) -> None:
        part, passes = self._place()
        self.counts[part, passes, kind] += 1

    def _place(self) -> tuple[str, str]:
        """Part and pass of what runs now: a gradient belongs where its forward was."""
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            # An inner span ends, and is listed, before the one around it.
            inner = (name for first, last, name in self._spans if first <= number < last)
            return next(inner, "model"), "backward"
        if self._current == "backward":
            return "model", "backward"
        return self._current, "update" if self._current == "optimizer" else "forward"


def count(case: Case, compiling: bool = True) -> list[Row]:
    """One row for each part and pass of a step; AssertionError for a launch that is wrong, or a wait.

    Args:
        compiling: off, launches are counted and no more.
    """
    parts = Parts()
    with ExitStack() as stack:
        stack.enter_context(pretended_driver(parts.launched, compiling=compiling))
        stack.enter_context(PretendedGpu())
        for module in (crossan_fast._losses, crossan_fast.model, crossan_fast.training.step):
            stack.enter_context(mock.patch.object(module, "span", parts.span))
        for name in ("deduplicate", "batch_rows"):
            stack.enter_context(mock.patch.object(ops, name, parts.of(name, getattr(ops, name))))
        step, item_ids = _step(case)
        step(item_ids)  # kernels compile, AdamW makes its state
        parts.counts.clear()
        parts._spans.clear()
        stack.enter_context(mock.patch.object(parts, "waits", []))
        observers.append(parts.op)
        stack.callback(observers.remove, parts.op)
        step(item_ids)
        assert not parts.waits, f"{case.name}: the host waits for the device at {parts.waits}"
    return [
        Row(
            torch.__version__,
            triton.__version__,
            case.name,
            case.precision,
            part,
            passes,
            parts.counts[part, passes, "triton"],
            parts.counts[part, passes, "torch"],
        )
        for part, passes in sorted({place[:2] for place in parts.counts})
    ]


def _step(case: Case) -> tuple[TrainStep, torch.Tensor]:
    """A step on the GPU, and its batch: no two histories of one length, most at the window's."""
    config, generator = case.config, torch.Generator().manual_seed(0)
    rows = case.items + 1
    with torch.device(GPU):
        model = CrossanModel(config, backend="triton")
        states = {m.name: torch.zeros(rows, m.levels, m.width).to(torch.bfloat16) for m in config.modalities}
        present = torch.ones(rows, len(states), dtype=torch.bool)
    present[0] = False
    present[1::3, 0] = not case.missing
    cache = HiddenStateCache.from_tensors(states, present)
    model.set_popularity(torch.ones(rows))
    places = config.window + 1
    item_ids = torch.randint(1, rows, (case.users, places), generator=generator)
    padding = torch.arange(case.users)[:, None] % places - 2
    item_ids[torch.arange(places) < padding] = 0
    optimizer = OptimizerConfig()
    return TrainStep(model, cache, make_optimizer(model, optimizer), optimizer, case.precision), item_ids.to(
        GPU
    )


# -------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cases' names and precisions")
    parser.add_argument("--check", action="store_true", help="fail on another count; write nothing")
    parser.add_argument("--count", action="store_true", help="launches are counted, not compiled and checked")
    options = parser.parse_args(arguments)
    cases = [c for c in CASES if any(only in f"{c.name} {c.precision}" for only in options.only)]
    if not cases:
        parser.error(f"--only: no case among {[f'{c.name} {c.precision}' for c in CASES]}")
    rows = []
    for case in cases:
        rows += (found := count(case, not options.count))
        print(table(found), flush=True)
    if not options.check:
        _write(rows)
        return 0
    problems = differences(rows, recorded())
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def table(rows: Sequence[Row]) -> str:
    """A case's counts, with their sums."""
    lines = [f"{rows[0].case} {rows[0].precision}", f"  {'':18s} {'pass':9s} {'triton':>7s} {'torch':>6s}"]
    lines += [f"  {r.part:18s} {r.passes:9s} {r.triton_launches:7d} {r.torch_ops:6d}" for r in rows]
    sums = sum(r.triton_launches for r in rows), sum(r.torch_ops for r in rows)
    return "\n".join([*lines, f"  {'all':28s} {sums[0]:7d} {sums[1]:6d}"])


def recorded() -> list[Row]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        table = list(csv.DictReader(file))
    return [Row(*(kind(row[name]) for name, kind in zip(_HEADER, _KINDS, strict=True))) for row in table]


def differences(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """Rows that are not recorded as they are, in words; none where other versions recorded the case."""
    problems = []
    for row in rows:
        same = [r for r in before if astuple(r)[:6] == astuple(row)[:6]]
        versions = {(r.torch, r.triton) for r in before if (r.case, r.precision) == (row.case, row.precision)}
        if same != [row] and versions in ({(row.torch, row.triton)}, set()):
            problems.append(
                f"{row}: recorded {same or 'nothing'}. `python -m benchmarks.launches` records anew."
            )
    return problems


def _write(rows: Sequence[Row]) -> None:
    """Replace the cases that were counted, keep the others there are; the file appears whole."""

    def key(row: Row) -> tuple[str, str]:
        return row.case, row.precision

    done, known = {key(row) for row in rows}, {(case.name, case.precision) for case in CASES}
    kept = [r for r in recorded() if key(r) in known - done]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows(astuple(r) for r in sorted([*kept, *rows], key=lambda r: (*key(r), r.part, r.passes)))
    write_whole(RESULTS, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
