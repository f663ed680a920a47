"""Plots and tables of a device, drawn from the recorded rows alone; `benchmarks.pages` says where they go."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import registry, results
from benchmarks.registry import IMPLEMENTATIONS, OURS
from benchmarks.results import Row
from benchmarks.targets import TARGETS, Rows, best, kinds
from crossan_fast._files import write_whole

# File name, title, which cases (a pattern that finds the number on the x axis), and what stands on that axis.
CURVES = (
    ("items", "side network + MOMEF against items", r"item_encoder/N=(\d+),M=4,D=768,.*", "items"),
    (
        "modalities",
        "side network + MOMEF against modalities",
        r"item_encoder/N=704,M=(\d+),D=768,.*",
        "modalities",
    ),
    ("width", "side network + MOMEF against width", r"item_encoder/N=704,M=4,D=(\d+),.*", "D"),
    ("loss", "in-batch loss against rows", r"in_batch_loss/rows=(\d+),.*", "rows"),
    ("batch", "training step against batch", r"step/B=(\d+),M=4,D=768,loss=in_batch", "users"),
    (
        "catalogue",
        "step against catalogue, memory-mapped, pages in memory",
        r"step_mapped/items=(\d+),B=64,M=2,D=384,pages=memory",
        "items in the cache",
    ),
)
# What our backends are compared with.
REFERENCES = ("eager", "compiled")
_STYLE = {"eager": "#888888", "autocast": "#bbbbbb", "compiled": "#d08a2e"}


def block(rows: Rows, plots: Sequence[Path], folder: Path) -> str:
    """One device's part of a page in `folder`: where and when, its targets, its table, its plots."""
    values = list(rows.values())
    last = max(values, key=lambda row: row.date)
    copy = max(row.copy_gbps for row in values)
    peak = {d: max((r.matmul_tflops for r in values if r.dtype == d), default=0) for d in ("fp32", "bf16")}
    commits = sorted({row.commit for row in values})
    lines = [
        f"### {last.device}",
        "",
        f"{last.threads} threads, torch {last.torch}, triton {last.triton or 'absent'}, up to "
        f"{last.date[:10]}, commits {', '.join(commits)}. Measured ceilings: copy {copy:,.0f} GB/s, "
        f"matrix product {peak['fp32']:.2f} TFLOP/s fp32, {peak['bf16']:.2f} bf16.",
        "",
        *_verdicts(rows),
        "",
        *table({key: row for key, row in rows.items() if key[0] in _headline()}),
    ]
    if plots:
        links = [f"![{p.stem.split('.')[-1]}]({os.path.relpath(p, folder)})" for p in plots]
        lines += ["", " ".join(links)]
    return "\n".join(lines)


def _headline() -> set[str]:
    """The cases that the site shows; the files hold the rest."""
    return {
        case.name for case in registry.all_cases() if case.tags & {"paper", "recipe", "catalogue", "epoch"}
    }


def targets(rows: Rows) -> list[str]:
    """A device's name, and what was asked of it beside what was measured; what was not is left out."""
    lines = [line for line in _verdicts(rows) if "| not measured |" not in line]
    return [f"**{next(iter(rows.values())).device}**", "", *lines]


# What README shows of each CPU, in words.
_SPEED = (
    ("side network + MOMEF, 704 items, M = 4, D = 768", "item_encoder/N=704,M=4,D=768,L=7,r=64"),
    ("training step, 64 users, M = 4, D = 768", "step/B=64,M=4,D=768,loss=in_batch"),
    ("full-softmax step, 256 users, M = 2, D = 384", "step/B=256,M=2,D=384,loss=full"),
    ("an epoch of the Scientific recipe", "epoch/data=scientific,B=64,M=2,D=384"),
)


def speed(devices: Sequence[Rows]) -> str:
    """What a CPU takes in fp32 by plain torch, by compiled torch and by ours: a line a case and device."""
    heads = ("fp32, forward + backward", "CPU", "eager ms", "compiled ms", "ours ms", "× eager", "× compiled")
    lines = [f"| {' | '.join(heads)} | MB, eager → ours |", "| --- " * (len(heads) + 1) + "|"]
    for what, case in _SPEED:
        for rows in devices:
            ours, light = best(rows, case, "fp32"), best(rows, case, "fp32", weighed=True)
            eager, compiled = (rows.get((case, "fp32", b, ours.passes if ours else "")) for b in REFERENCES)
            if ours is None or eager is None or eager.commit != ours.commit:
                continue
            if compiled is not None and compiled.commit != ours.commit:
                compiled = None
            times = (
                _plain(eager),
                _plain(compiled),
                _plain(ours),
                _ratio(eager, ours),
                _ratio(compiled, ours),
            )
            memory = "" if light is None else f"{_memory(eager)} → {_memory(light)}"
            lines.append(f"| {what} | {ours.device} | {' | '.join(times)} | {memory} |")
    return "\n".join(lines)


def _verdicts(rows: Rows) -> list[str]:
    answering = kinds(next(iter(rows.values())).device)
    lines = ["| target | asked | measured | |", "| --- | --- | --- | --- |"]
    for target in TARGETS:
        if target.device not in answering:
            continue
        found = target.measured(rows)
        if found is None:
            lines.append(f"| {target.what} | {target.asked} | not measured | |")
        else:
            value, row = found
            verdict = "met" if target.met(value) else "**missed**"
            shown = f"{target.shown(value)} ({row.backend})"
            lines.append(f"| {target.what} | {target.asked} | {shown} | {verdict} |")
    return lines


def table(rows: Rows) -> list[str]:
    """A line for each case, dtype and backend of ours: forward + backward, beside eager and compiled."""
    heads = ("case", "type", "eager ms", "compiled ms", "ours ms", "× eager", "× compiled")
    lines = [f"| {' | '.join(heads)} | MB, eager → ours | of floor |", "| --- " * 9 + "|"]
    for (case, dtype, backend, passes), row in sorted(rows.items()):
        if passes not in ("both", "run") or backend not in OURS:
            continue
        eager = rows.get((case, dtype, "eager", passes))
        compiled = rows.get((case, dtype, "compiled", passes))
        cells = (
            case,
            dtype,
            _time(eager),
            _time(compiled),
            f"{_time(row)} {backend}",
            _ratio(eager, row),
            _ratio(compiled, row),
            f"{_memory(eager)} → {_memory(row)}",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plots_of(csv: Path) -> list[Path]:
    """The plots that `draw` left beside a file."""
    return [path for name, *_ in CURVES if (path := _plot(csv, name)).is_file()]


def _plot(csv: Path, name: str) -> Path:
    return csv.with_name(f"{csv.stem}.{name}.png")


def draw(rows: Rows, csv: Path) -> list[Path]:
    """Time and memory against each axis, one file an axis: `<device>.<axis>.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, title, pattern, axis in CURVES:
        curves = _curves(rows.values(), re.compile(pattern))
        if not any(len(points) > 1 for points in curves.values()):
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
        for (dtype, backend), points in sorted(curves.items(), key=lambda item: _order(item[0])):
            points.sort(key=lambda point: point[0])
            line = "-" if dtype == "fp32" else "--"
            heavy = [(x, row.peak_bytes / 1e6) for x, row in points if row.peak_bytes]
            timed = [(x, row.p50_ms) for x, row in points]
            for panel, values in zip(panels, (timed, heavy), strict=True):
                panel.plot(
                    [x for x, _ in values],
                    [y for _, y in values],
                    label=f"{backend} {dtype}",
                    color=_STYLE.get(backend),
                    linestyle=line,
                    marker=".",
                )
        for panel, what in zip(panels, ("ms", "MB added at the peak"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=what)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        figure.suptitle(title, fontsize=10)
        path = _plot(csv, name)
        image = io.BytesIO()
        figure.savefig(image, dpi=120, format="png")
        write_whole(path, image.getvalue())
        pyplot.close(figure)
        written.append(path)
    return written


def _curves(rows: Iterable[Row], pattern: re.Pattern[str]) -> dict[tuple[str, str], list[tuple[int, Row]]]:
    curves: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for row in rows:
        match = pattern.fullmatch(row.case)
        if match and row.passes in ("both", "run"):
            curves.setdefault((row.dtype, row.backend), []).append((int(match.group(1)), row))
    return curves


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return IMPLEMENTATIONS.index(key[1]), key[0]


def summary(rows: Sequence[Row]) -> str:
    """A short table for a terminal: the targets, then every case's forward + backward."""
    latest = results.latest(rows)
    lines = []
    if latest:
        lines += [re.sub(r"\*\*|\| ---.*\|$", "", line) for line in _verdicts(latest)]
    lines += [re.sub(r"\| ---.*\|$", "", line) for line in table(latest)]
    return "\n".join(line for line in lines if line)


def _plain(row: Row | None) -> str:
    """Three figures at least, and no exponent."""
    return "" if row is None else f"{row.p50_ms:,.0f}" if row.p50_ms >= 100 else f"{row.p50_ms:.3g}"


def _time(row: Row | None) -> str:
    return "" if row is None else f"{row.p50_ms:.3g}"


def _ratio(other: Row | None, ours: Row) -> str:
    # Of one commit: a baseline that was measured on another day and machine's mood gives no ratio.
    return "" if other is None or other.commit != ours.commit else f"{other.p50_ms / ours.p50_ms:.1f}"


def _memory(row: Row | None) -> str:
    return "?" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
