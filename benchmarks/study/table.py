"""A size's table and bars, from its recorded rows, with the papers' own figures beside them."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipes.tabulate import Row, read
from benchmarks.study.learning import EVALUATE_EVERY, PATIENCE
from benchmarks.study.methods import METHODS, Method
from crossan_fast._files import write_whole

# Seconds an epoch, GB and millions of parameters as the papers print them, on their hardware and data.
PAPERS = (
    ("Full fine-tuning", "443", "46.76", "195"),
    ("Adapter, LoRA", "350 to 380", "37 to 39", ""),
    ("IISAN, uncached", "179", "8.32", ""),
    ("IISAN, cached", "22", "3.11", "4"),
    ("CROSSAN, against the best efficient method", "−30 %", "−20 %", "−57 %"),
)
WEIGHTS = {"time": 0.45, "parameters": 0.1, "memory": 0.45}
# What issue and abstract claim of CROSSAN fast: (against, share of its time, share of its memory).
CLAIMS = (("fft", 1 / 20, 1 / 5), ("lora", 1 / 20, 1 / 5), ("iisan_eager", 0.7, 0.8))
_COLOURS = {"trained": "#888888", "uncached": "#0072B2", "cached": "#D55E00", "ids": "#009E73"}


@dataclass(frozen=True)
class Cost:
    """Of one method: seconds an epoch, trained parameters, and bytes at most."""

    seconds: float
    parameters: float
    memory: float


def tpme(costs: dict[str, Cost]) -> dict[str, float]:
    """IISAN's TPME (arXiv 2404.02059): time, parameters and memory, each scaled to 0..1 over the methods.

    0 is the cheapest in all three, 1 the dearest. Where all methods cost the same, that cost counts 0.
    """

    def scaled(values: dict[str, float]) -> dict[str, float]:
        low, high = min(values.values()), max(values.values())
        return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()}

    time = scaled({name: cost.seconds for name, cost in costs.items()})
    parameters = scaled({name: cost.parameters for name, cost in costs.items()})
    memory = scaled({name: cost.memory for name, cost in costs.items()})
    return {
        name: WEIGHTS["time"] * time[name]
        + WEIGHTS["parameters"] * parameters[name]
        + WEIGHTS["memory"] * memory[name]
        for name in costs
    }


def costs_of(rows: list[Row]) -> dict[str, Cost]:
    """The latest times of each method on the device that was measured last."""
    timed = [row for row in rows if row["phase"] == "time" and row["memory_bytes"]]
    latest = {row["method"]: row for row in timed if row["device"] == timed[-1]["device"]}
    return {
        name: Cost(float(row["epoch_s"]), float(row["trainable"]), float(row["memory_bytes"]))
        for name, row in latest.items()
    }


def accuracies_of(rows: list[Row]) -> dict[str, list[Row]]:
    """The latest row of each method and seed; one that was cut short does not stand for a longer one."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["method"], row["seed"]
        if row["phase"] == "accuracy" and not (
            key in kept and not _ended(row) and _epochs([row]) < _epochs([kept[key]])
        ):
            kept[key] = row
    found: dict[str, list[Row]] = {}
    for row in kept.values():
        found.setdefault(row["method"], []).append(row)
    return found


def equally_long(rows: list[Row]) -> tuple[float, dict[str, list[Row]]]:
    """The latest rows by method and seed of as many epochs, the number that most methods have, one of which
    trains encoders: that number, and rows by method; 0 and none where no two methods have as many."""
    learned: dict[float, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["phase"] == "accuracy":
            learned.setdefault(_epochs([row]), {}).setdefault(row["method"], {})[row["seed"]] = row
    fitting = {
        epochs: found
        for epochs, found in learned.items()
        if len(found) > 1 and any(METHODS[name].kind == "trained" for name in found)
    }
    if not fitting:
        return 0.0, {}
    epochs = max(fitting, key=lambda epochs: (len(fitting[epochs]), epochs))
    return epochs, {name: list(by_seed.values()) for name, by_seed in fitting[epochs].items()}


def write(path: Path) -> list[Path]:
    """The Markdown table and the bars of a file of rows, beside it."""
    rows = read(path)
    picture = path.with_suffix(".png")
    write_whole(path.with_suffix(".md"), markdown(rows, path.stem))
    draw(rows, picture)
    return [path.with_suffix(".md"), picture]


def markdown(rows: list[Row], name: str) -> str:
    """The page of a size."""
    timed = {row["method"]: row for row in rows if row["phase"] == "time"}
    costs, accuracies = costs_of(rows), accuracies_of(rows)
    scores = tpme(costs) if costs else {}
    lines = [f"# Every method in one trainer: {name.removeprefix('study-')}", ""]
    lines += [_where(rows, "time", "Times and memory"), _where(rows, "accuracy", "Accuracy"), ""]
    heads = ["method", "s an epoch", "whole epoch", "memory MB", "held", "cached states", "a step adds"]
    heads += ["trained parameters", "TPME %", "HR@10", "NDCG@10", "learned for"]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for method in METHODS.values():
        if method.name in timed or method.learns_as in accuracies:
            cells = _cost_cells(timed.get(method.name), scores.get(method.name))
            lines.append(f"| {method.title} | {' | '.join(cells + _accuracy_cells(method, accuracies))} |")
    lines += _not_learned(costs, accuracies)
    lines += _compared_early(rows, costs)
    lines += ["", *_claims(costs), "", f"![bars]({name}.png)", "", *_papers()]
    return "\n".join(lines) + "\n"


def short(rows: list[Row]) -> str:
    """A line a method, for README: what an epoch costs and what comes of it."""
    costs, accuracies = costs_of(rows), accuracies_of(rows)
    lines = ["| method | seconds an epoch | memory MB | trained parameters | HR@10, % |", "| --- " * 5 + "|"]
    for method in METHODS.values():
        if (cost := costs.get(method.name)) is None:
            continue
        hits = "not run"
        if learned := accuracies.get(method.learns_as):
            mean = statistics.fmean(100 * float(row["test_hr@10"]) for row in learned)
            hits = f"{mean:.2f}"
            if rising(learned):
                hits += f" after {_epochs(learned):.3g} epochs, still rising"
        cells = (_figures(cost.seconds), _megabytes(str(cost.memory)), f"{cost.parameters:,.0f}", hits)
        lines.append(f"| {method.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _where(rows: list[Row], phase: str, what: str) -> str:
    found = [row for row in rows if row["phase"] == phase]
    if not found:
        return f"{what}: not measured."
    last = found[-1]
    commits = ", ".join(sorted({row["commit"] for row in found}))
    threads, precisions = (
        " or ".join(sorted({row[key] for row in found})) for key in ("threads", "precision")
    )
    text = (
        f"{what}: {last['device']}, {threads} threads, torch {last['torch']}, {precisions}, "
        f"{last['date'][:10]}, commits {commits}."
    )
    if phase == "accuracy":
        text += (
            f" {int(last['users']):,} users ranked among all {int(last['candidates']):,} items, "
            f"filter_history={last['filter_history']}, ties against the target, in %."
        )
    return text


def _cost_cells(row: Row | None, score: float | None) -> list[str]:
    if row is None:
        return [""] * 8
    sizes = [_megabytes(row[key]) for key in ("memory_bytes", "held_bytes", "states_bytes", "step_bytes")]
    return [
        _figures(float(row["epoch_s"])),
        _figures(float(row["whole_epoch_s"])) if row["whole_epoch_s"] else "",
        *sizes,
        f"{int(row['trainable']):,}",
        "" if score is None else f"{100 * score:.2f}",
    ]


def _accuracy_cells(method: Method, accuracies: dict[str, list[Row]]) -> list[str]:
    found = accuracies.get(method.learns_as, [])
    if not found:
        return ["not run", "not run", ""]
    if method.accuracy_of:
        return [f"as {METHODS[method.accuracy_of].title}", "", ""]
    epochs = _epochs(found)
    seeds = "" if len(found) == 1 else f", {len(found)} seeds"
    seeds += "".join(f", {name}" for name in sorted({row["precision"] for row in found} - {"fp32"}))
    return [*_metrics(found), f"{epochs:.3g} epochs{seeds}{', still rising' if rising(found) else ''}"]


def rising(rows: list[Row]) -> bool:
    """Whether a run was stopped while its last epoch was still its best: no figure of where it would end."""
    return any(float(row["best_epoch"]) >= float(row["learned_epochs"]) for row in rows)


def _epochs(rows: list[Row]) -> float:
    return statistics.fmean(float(row["learned_epochs"]) for row in rows)


def _ended(row: Row) -> bool:
    """Whether a training came to its end by itself, validation gaining no more."""
    return float(row["learned_epochs"]) - float(row["best_epoch"]) >= EVALUATE_EVERY * PATIENCE


def _compared_early(rows: list[Row], costs: dict[str, Cost]) -> list[str]:
    """Methods after as many epochs each, with what these cost."""
    epochs, found = equally_long(rows)
    if not found:
        return []
    lines = ["", f"After {epochs:.3g} epochs of each; seconds are so many of the epochs above.", ""]
    lines += ["| method | training, s | HR@10 | NDCG@10 | learned in |", "| --- " * 5 + "|"]
    for name in (name for name in METHODS if name in found):
        seconds = _figures(epochs * costs[name].seconds) if name in costs else ""
        precision = " or ".join(sorted({row["precision"] for row in found[name]}))
        lines.append(
            f"| {METHODS[name].title} | {' | '.join([seconds, *_metrics(found[name]), precision])} |"
        )
    return lines


def _metrics(rows: list[Row]) -> list[str]:
    """HR@10 and NDCG@10 in %, mean and spread over seeds."""
    values = [[100 * float(row[f"test_{metric}@10"]) for row in rows] for metric in ("hr", "ndcg")]
    return [
        f"{statistics.fmean(v):.2f}" + (f" ± {statistics.stdev(v):.2f}" if len(v) > 1 else "") for v in values
    ]


def _not_learned(costs: dict[str, Cost], accuracies: dict[str, list[Row]]) -> list[str]:
    """What is missing for want of time, in words."""
    without = [m for m in METHODS.values() if m.name in costs and not m.accuracy_of]
    without = [m for m in without if m.name not in accuracies]
    if not without:
        return []
    slowest = max(costs[method.name].seconds for method in without)
    names = "; ".join(method.title for method in without)
    return ["", f"Not trained on this machine: {names}. An epoch takes up to {_figures(slowest)} s."]


def _claims(costs: dict[str, Cost]) -> list[str]:
    ours = costs.get("crossan_fast")
    if ours is None:
        return []
    lines = ["| CROSSAN cached, fast, against | time | asked | memory | asked |", "| --- " * 5 + "|"]
    for against, time, memory in CLAIMS:
        if other := costs.get(against):
            cells = []
            for share, asked in (
                (ours.seconds / other.seconds, time),
                (ours.memory / other.memory, memory),
            ):
                verdict = "met" if share <= asked else "**missed**"
                cells += [f"1/{1 / share:.1f}", f"≤ 1/{1 / asked:.3g}: {verdict}"]
            lines.append(f"| {METHODS[against].title} | {' | '.join(cells)} |")
    return lines


def _papers() -> list[str]:
    lines = [
        "The papers' own figures (IISAN, arXiv 2404.02059; CROSSAN, arXiv 2504.10307): theirs, on other "
        "hardware and data, not to be compared with the rows above but in their order.",
        "",
        "| theirs | s an epoch | memory GB | trained parameters, millions |",
        "| --- " * 4 + "|",
    ]
    return [*lines, *(f"| {' | '.join(row)} |" for row in PAPERS)]


def _figures(value: float) -> str:
    """Three figures, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(text: str) -> str:
    return f"{float(text) / 1e6:,.0f}" if text else ""


def draw(rows: list[Row], path: Path) -> None:
    """Bars of every method: time, memory and parameters on logarithmic axes, HR@10 on a linear one."""
    from matplotlib.figure import Figure

    costs, accuracies = costs_of(rows), accuracies_of(rows)
    hits = {
        method.name: 100 * statistics.fmean(float(row["test_hr@10"]) for row in accuracies[method.learns_as])
        for method in METHODS.values()
        if method.learns_as in accuracies
    }
    panels = (
        ("seconds an epoch", {name: cost.seconds for name, cost in costs.items()}, True),
        ("memory, MB", {name: cost.memory / 1e6 for name, cost in costs.items()}, True),
        ("trained parameters", {name: cost.parameters for name, cost in costs.items()}, True),
        ("HR@10, %", hits, False),
    )
    names = [name for name in METHODS if name in costs or name in hits]
    figure = Figure(figsize=(13, 0.6 + 0.33 * max(len(names), 2)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values, logarithmic) in zip(axes, panels, strict=True):
        shown = [name for name in names if name in values]
        bars = axis.barh(
            [names.index(name) for name in shown],
            [values[name] for name in shown],
            color=[_COLOURS[METHODS[name].kind] for name in shown],
        )
        for name, bar in zip(shown, bars, strict=True):
            label, start = f" {_figures(values[name])}", values[name]
            if values is hits and rising(found := accuracies[METHODS[name].learns_as]):
                epochs = _epochs(found)
                bar.set(hatch="///", alpha=0.4, edgecolor="white")
                label, start = f"{label} after {epochs:.3g} epochs, still rising", 0.0
            axis.text(start, names.index(name), label, va="center", fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(names)), [METHODS[name].title for name in names], fontsize=8)
        axis.margins(x=0.3)
        if logarithmic and shown:
            axis.set_xscale("log")
    axes[0].invert_yaxis()
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    write_whole(path, content.getvalue())
