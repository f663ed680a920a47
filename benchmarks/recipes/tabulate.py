"""The recipes' tables and curve, from their committed files: `python -m benchmarks.recipes.tabulate`."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from benchmarks.recipes.basis import BASES
from benchmarks.recipes.scientific import EPOCHS, RESULTS, RUNS, p20
from crossan_fast._files import write_whole

TABLE, CURVE = RESULTS / "scientific.md", RESULTS / "scientific.png"
BASIS_TABLE = RESULTS / "basis.md"
_COLOURS = {"in_batch": "#0072B2", "full": "#D55E00"}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_variant(rows: list[Row]) -> dict[str, list[Row]]:
    """The latest row of each (variant, seed, epoch), grouped by variant."""
    latest = {(row["variant"], row["seed"], row.get("epoch")): row for row in rows}
    grouped: dict[str, list[Row]] = {}
    for row in latest.values():
        grouped.setdefault(row["variant"], []).append(row)
    return grouped


def table(runs: dict[str, list[Row]], epochs: dict[str, list[Row]]) -> str:
    """Markdown: test metrics a run, their means, and validation at equal epochs and equal time."""
    first = next(iter(runs.values()))[0]
    lines = [
        "# Scientific: test metrics at the best validation epoch",
        "",
        f"{int(first['users']):,} users ranked among all {int(first['candidates']):,} items, "
        f"filter_history={first['filter_history']}, ties against the target; in %. "
        f"{first['device']}, torch {first['torch']}. Seconds of an epoch are the 20th percentile over the "
        "run's epochs, which leaves out the other work of a shared machine.",
        "",
        "| loss | seed | threads | batch | learning rate | average | best epoch | of "
        "| HR@5 | HR@10 | NDCG@10 | HR@20 | MRR | s an epoch |",
        "| --- " * 14 + "|",
    ]
    metrics = ("hr@5", "hr@10", "ndcg@10", "hr@20", "mrr")
    for variant, rows in runs.items():
        seconds = {seed: curve[0][1] / curve[0][0] for seed, curve in _curves(epochs[variant]).items()}
        for row in sorted(rows, key=lambda row: int(row["seed"])):
            values = " | ".join(_percent(row[f"test_{name}"]) for name in metrics)
            lines.append(
                f"| {variant} | {row['seed']} | {row['threads']} | {row['batch_size']} "
                f"| {row['learning_rate']} | {row['average']} | {row['best_epoch']} | {row['epochs']} "
                f"| {values} | {seconds[row['seed']]:.1f} |"
            )
        means = [statistics.fmean(float(row[f"test_{name}"]) for row in rows) for name in metrics]
        values = " | ".join(f"**{100 * mean:.2f}**" for mean in means)
        lines.append(f"| {variant} | mean of {len(rows)} | | | | | | | {values} | |")
    if len(epochs) > 1:
        lines += ["", "## Validation NDCG@10 of both losses, mean over seeds", "", *compare(epochs)]
    lines += ["", "![curve](scientific.png)", "", "Drawn by `python -m benchmarks.recipes.tabulate`."]
    return "\n".join(lines) + "\n"


def compare(epochs: dict[str, list[Row]]) -> list[str]:
    """The best so far at equal epochs, and at equal training time."""
    curves = {variant: list(_curves(rows).values()) for variant, rows in epochs.items()}
    ends = [curve[-1] for seeds in curves.values() for curve in seeds]
    lines = ["| | " + " | ".join(curves) + " |", "| --- |" + " --- |" * len(curves)]

    def add(label: str, column: int, limit: float) -> None:
        cells = []
        for seeds in curves.values():
            seen = [[point[2] for point in curve if point[column] <= limit] for curve in seeds]
            cells.append(_percent(statistics.fmean(map(max, seen))) if all(seen) else "not yet evaluated")
        lines.append(f"| after {label} | " + " | ".join(cells) + " |")

    shortest = min(end[0] for end in ends)
    for epoch in sorted({*range(5, shortest, 5), shortest}):
        add(f"{epoch} epochs", 0, epoch)
    soonest, latest = min(end[1] for end in ends), max(end[1] for end in ends)
    for limit in sorted({0.25 * soonest, 0.5 * soonest, soonest, 0.5 * latest, latest}):
        add(f"{limit:.0f} s of training", 1, limit)
    return lines


def draw(epochs: dict[str, list[Row]], path: Path) -> None:
    """Validation NDCG@10 against epochs and against training time, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for variant, rows in epochs.items():
        for index, curve in enumerate(_curves(rows).values()):
            numbers, seconds, values = zip(*curve, strict=True)
            percent = [100 * value for value in values]
            style = {"color": _COLOURS[variant], "label": variant if index == 0 else None, "linewidth": 1.2}
            left.plot(numbers, percent, **style)
            right.plot(seconds, percent, **style)
    left.set(xlabel="epoch", ylabel="validation NDCG@10, %")
    right.set(xlabel="seconds: epochs × the run's 20th percentile of one")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.legend(frameon=False, title="loss")
    figure.savefig(path, dpi=160)


def _curves(rows: list[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """(epoch, seconds, NDCG@10) in order, for each seed.

    Seconds count every epoch as the 20th percentile of the run's epochs: machines are shared, runs resumed.
    """
    seeds: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (int(row["seed"]), int(row["epoch"]))):
        seeds.setdefault(row["seed"], []).append(row)
    curves = {}
    for seed, points in seeds.items():
        numbers = [int(row["epoch"]) for row in points]
        clock = [float(row["train_seconds"]) for row in points]
        spans = zip(numbers, [0, *numbers], clock, [0.0, *clock], strict=False)
        typical = p20([(after - before) / (now - last) for now, last, after, before in spans])
        curves[seed] = [
            (n, n * typical, float(row["validation_ndcg@10"])) for n, row in zip(numbers, points, strict=True)
        ]
    return curves


def _percent(share: str | float) -> str:
    return f"{100 * float(share):.2f}"


def basis_table(rows: list[Row]) -> str:
    """Markdown: for each data set a line a width, means over seeds, and which width is enough."""
    latest = {(row["data"], int(row["width"]), row["seed"]): row for row in rows}
    lines = [
        "# Fewer dimensions: the recipes on caches in bases of their own",
        "",
        "Test metrics at the best validation epoch, in %, mean over seeds ± their standard deviation. "
        "Seconds of an epoch are the 20th percentile over a run's, the least over seeds.",
    ]
    for data in sorted({data for data, _, _ in latest}):
        widths = sorted({width for found, width, _ in latest if found == data}, reverse=True)
        groups = {w: [row for key, row in latest.items() if key[:2] == (data, w)] for w in widths}
        first = groups[widths[0]][0]
        machines = sorted(
            {f"{row['device']}; threads {row['threads']}" for g in groups.values() for row in g}
        )
        lines += [
            "",
            f"## {data}",
            "",
            f"{int(first['users']):,} users ranked among all {int(first['candidates']):,} items, "
            f"filter_history={first['filter_history']}. {' / '.join(machines)}.",
            "",
            "| dimensions | energy | MB of states | s an epoch | seeds | HR@10 | NDCG@10 |",
            "| --- " * 7 + "|",
        ]
        for width, group in groups.items():
            seconds = min(float(row["epoch_seconds"]) for row in group)
            lines.append(
                f"| {width} | {group[0]['energy']} | {group[0]['megabytes']} | {seconds:.1f} | {len(group)} "
                f"| {_spread(group, 'hr@10')} | {_spread(group, 'ndcg@10')} |"
            )
        if enough := fewest_within_noise(groups):
            lines += ["", f"Within two standard errors of all dimensions, both metrics: {enough}."]
    return "\n".join([*lines, "", "Drawn by `python -m benchmarks.recipes.tabulate`."]) + "\n"


def fewest_within_noise(groups: dict[int, list[Row]]) -> int | None:
    """The least width at which neither metric's mean is two standard errors below that of the largest.

    None where a width has a single seed: its noise is not known.
    """
    if any(len(group) < 2 for group in groups.values()):
        return None

    def lower(group: list[Row], metric: str) -> bool:
        ours, full = ([float(row[f"test_{metric}"]) for row in rows] for rows in (group, groups[max(groups)]))
        error = sum(statistics.variance(values) / len(values) for values in (ours, full)) ** 0.5
        return statistics.fmean(full) - statistics.fmean(ours) > 2 * error

    return min(w for w, g in groups.items() if not lower(g, "hr@10") and not lower(g, "ndcg@10"))


def _spread(group: list[Row], metric: str) -> str:
    values = [100 * float(row[f"test_{metric}"]) for row in group]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def main() -> None:
    runs, epochs = by_variant(read(RUNS)), by_variant(read(EPOCHS))
    write_whole(TABLE, table(runs, epochs))
    draw(epochs, CURVE)
    print(TABLE.read_text(encoding="utf-8"))
    if BASES.is_file():
        write_whole(BASIS_TABLE, basis_table(read(BASES)))
        print(BASIS_TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
