"""The recipes' tables and curve, from their committed files: `python -m benchmarks.recipes.tabulate`."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.recipes import tables
from benchmarks.recipes.ablations import RETENTION
from benchmarks.recipes.basis import BASES
from benchmarks.recipes.caches import RECIPES
from benchmarks.recipes.encoders import ROWS
from benchmarks.recipes.records import RESULTS, Row, p20, read
from benchmarks.recipes.run import EPOCHS, PLAIN, RUNS
from benchmarks.recipes.tables import percent, spread
from crossan_fast._files import write_whole

TABLE, CURVE = RESULTS / "scientific.md", RESULTS / "scientific.png"
ABLATIONS_TABLE, BASIS_TABLE = RESULTS / "ablations.md", RESULTS / "basis.md"
ENCODERS_TABLE, ENCODERS_PLOT = RESULTS / "encoders.md", RESULTS / "encoders.png"
CURVES = "scientific"
# What the curve calls the recipe and its variant: by what sets them apart.
_LOSSES = {PLAIN: "in_batch", "full": "full"}
_COLOURS = {"in_batch": "#0072B2", "full": "#D55E00"}


def by_loss(rows: list[Row]) -> dict[str, list[Row]]:
    """Of the recipe that has a curve, the latest row of each (seed, epoch), grouped by loss."""
    own = [row for row in rows if row["data"] == CURVES and row["setting"] in _LOSSES]
    latest = {(row["setting"], row["seed"], row.get("epoch")): row for row in own}
    grouped: dict[str, list[Row]] = {}
    for row in latest.values():
        grouped.setdefault(_LOSSES[row["setting"]], []).append(row)
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
            values = " | ".join(percent(row[f"test_{name}"]) for name in metrics)
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
            cells.append(percent(statistics.fmean(map(max, seen))) if all(seen) else "not yet evaluated")
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
        ties = tables.ties_head([row for group in groups.values() for row in group])
        lines += [
            "",
            f"## {data}",
            "",
            f"{int(first['users']):,} users ranked among all {int(first['candidates']):,} items, "
            f"filter_history={first['filter_history']}. {' / '.join(machines)}.",
            "",
            tables.head(
                ["dimensions", "energy", "MB of states", "s an epoch", "seeds", "HR@10", "NDCG@10", *ties]
            ),
        ]
        for width, group in groups.items():
            seconds = min(float(row["epoch_seconds"]) for row in group)
            cells = [str(width), group[0]["energy"], group[0]["megabytes"], f"{seconds:.1f}", str(len(group))]
            cells += [spread(tables.of(group, metric)) for metric in tables.METRICS]
            cells += tables.ties_cells(group) if ties else []
            lines.append(f"| {' | '.join(cells)} |")
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


def main() -> None:
    runs = read(RUNS)
    losses, epochs = by_loss(runs), by_loss(read(EPOCHS))
    write_whole(TABLE, table(losses, epochs))
    draw(epochs, CURVE)
    retention = read(RETENTION) if RETENTION.is_file() else []
    write_whole(ABLATIONS_TABLE, tables.ablations_table(sorted(runs, key=_recipe), retention))
    if BASES.is_file():
        write_whole(BASIS_TABLE, basis_table(read(BASES)))
    if ROWS.is_file():
        write_whole(ENCODERS_TABLE, tables.encoders_table(read(ROWS)))
        tables.draw_encoders(read(ROWS), ENCODERS_PLOT)
    for path in (TABLE, ABLATIONS_TABLE, BASIS_TABLE, ENCODERS_TABLE):
        if path.is_file():
            print(path.read_text(encoding="utf-8"))


def _recipe(row: Row) -> tuple[int, str]:
    name, before = tables.dated(row["data"])
    return list(RECIPES).index(name), before


if __name__ == "__main__":
    main()
