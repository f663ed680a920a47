"""Markdown of the recipes' runs and ablations, and of the study of encoders, from their rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.recipes.caches import RECIPES
from benchmarks.recipes.encoders import ENCODERS, MODELS
from benchmarks.recipes.records import Row
from benchmarks.recipes.run import PLAIN

METRICS = ("hr@10", "ndcg@10")
# HR@10 / NDCG@10 in %, with where they stand; the data and protocol are the recipe's.
PUBLISHED = {
    "scientific4k": (
        ("MISSRec, CLIP text and image, no ids, no pre-training (its logs)", "12.69", "6.59"),
        ("MISSRec, the same with ids (its logs)", "12.82", "7.11"),
    ),
}

_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73")


def percent(share: str | float) -> str:
    return f"{100 * float(share):.2f}"


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± standard deviation of shares, in points."""
    mean, sign = 100 * statistics.fmean(values), "+" if signed else ""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean:{sign}.2f}{deviation}"


def dated(data: str) -> tuple[str, str]:
    """A recipe's name, and what rows of one of before say: " (recipe of 2026-11-29)", or nothing."""
    name, _, before = data.partition(" (")
    return name, before and f" ({before}"


def of(rows: Iterable[Row], metric: str, part: str = "test") -> list[float]:
    return [float(row[f"{part}_{metric}"]) for row in rows]


def ties_head(rows: Iterable[Row]) -> list[str]:
    """Heads of the columns for test metrics with what ties in random order; none where no row has them."""
    return ["ties in random order", "NDCG@10"] if any(row["test_ties_hr@10"] for row in rows) else []


def ties_cells(rows: Sequence[Row]) -> list[str]:
    """A group's cells under `ties_head`; empty ones unless all of its rows have them."""
    told = all(row["test_ties_hr@10"] for row in rows)
    return [spread([float(row[f"test_ties_{metric}"]) for row in rows]) if told else "" for metric in METRICS]


def paired(ours: Sequence[Row], theirs: Sequence[Row], metric: str, part: str = "test") -> list[float]:
    """Differences of one metric on the seeds that both have, on the same machine where both have it there.

    Machines round differently, an encoder's states first of all: between two of them the three seeds of one
    recipe moved by five times what they differ on either.
    """
    first = {row["seed"]: row for row in ours}
    second: dict[str, Row] = {}
    for row in theirs:
        mine = first.get(row["seed"])
        held = second.get(row["seed"])
        if mine and (held is None or held["device"] != mine["device"] or row["device"] == mine["device"]):
            second[row["seed"]] = row
    common = sorted(second, key=int)
    return [of([first[s]], metric, part)[0] - of([second[s]], metric, part)[0] for s in common]


def protocol(rows: Sequence[Row]) -> str:
    """How a data set's rows were evaluated, and on what."""
    first = rows[0]
    machines = sorted({f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows})
    return (
        f"A user's last item tests, the one before validates and picks the epoch. {int(first['users']):,} "
        f"users ranked among all {int(first['candidates']):,} items, "
        f"filter_history={first['filter_history']}, ties against the target; in %, mean over seeds ± their "
        f"standard deviation. {' / '.join(machines)}."
    )


def ablations_table(rows: Sequence[Row], retention: Sequence[Row] = ()) -> str:
    """Every recipe and what was tried on it: a table a data set, a line a setting, best validation first."""
    lines = ["# Recipes, and what was tried on them"]
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        lines += ["", f"## {data}", "", protocol(own), ""]
        ties = ties_head(own)
        named = ["setting", "cache", "seeds", "epochs", "validation HR@10", "NDCG@10", "less the recipe's"]
        lines += [head([*named, "test HR@10", "NDCG@10", *ties])]
        groups = grouped(own, "setting", "cache")
        name, _ = dated(data)
        recipe = (PLAIN, name + RECIPES[name].suffix)
        plain = groups.get(recipe, [])
        every = [row for row in own if (row["setting"], row["cache"]) == recipe]  # of older machines, too
        best_first = sorted(
            groups.items(), key=lambda g: statistics.fmean(of(g[1], "ndcg@10", "validation")), reverse=True
        )
        for (setting, cache), group in best_first:
            differences = [] if group is plain else paired(group, every, "ndcg@10", "validation")
            cells = [
                f"**{setting}**" if group is plain else setting if setting == PLAIN else f"`{setting}`",
                cache,
                " ".join(sorted(row["seed"] for row in group)),
                f"{statistics.fmean(int(row['epochs']) for row in group):.0f}",
                *(spread(of(group, metric, "validation")) for metric in METRICS),
                spread(differences, signed=True) if differences else "",
                *(spread(of(group, metric)) for metric in METRICS),
            ]
            cells += ties_cells(group) if ties else []
            lines.append(f"| {' | '.join(cells)} |")
        for name, hits, gain in PUBLISHED.get(data, ()):
            figures = f"| | {hits} | {gain} |" if ties else f"{hits} | {gain} |"
            lines.append(f"| {name} | | | | | | | {figures}")
    if retention:
        lines.append(retention_table(retention).rstrip("\n"))
    return "\n".join([*lines, "", "Drawn by `python -m benchmarks.recipes.tabulate`."]) + "\n"


def retention_table(rows: Sequence[Row]) -> str:
    """Markdown: what is left of test HR@10 where every item lacks a modality, means over seeds."""
    lines = ["", "## Without a modality at test time", ""]
    lines += [head(["cache", "setting", "seeds", "HR@10", "without", "HR@10", "retained"])]
    groups = grouped(rows, "data", "cache", "setting", "without")
    for (data, cache, setting, missing), group in groups.items():
        retained = statistics.fmean(float(row["retention_hr@10"]) for row in group)
        cells = [
            cache + dated(data)[1],
            setting if setting == PLAIN else f"`{setting}`",
            " ".join(sorted(row["seed"] for row in group)),
            spread([float(row["whole_hr@10"]) for row in group]),
            missing,
            spread(of(group, "hr@10")),
            f"{100 * retained:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their entries under `keys`, the latest of each seed."""
    latest = {(*(row[key] for key in keys), row["seed"]): row for row in rows}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for key, row in latest.items():
        groups.setdefault(key[:-1], []).append(row)
    return groups


Subsets = Mapping[tuple[str, ...], list[Row]]


def encoders_table(rows: Sequence[Row]) -> str:
    """Of each kind of states: accuracy of every subset and model, and what more encoders add, by seed."""
    lines = ["# Are more encoders better? Every subset of three, one state each", "", protocol(rows)]
    for states in dict.fromkeys(row["states"] for row in rows):
        groups = grouped([row for row in rows if row["states"] == states], "model", "encoders")
        models = [model for model in MODELS if any(key[0] == model for key in groups)]
        for metric in METRICS:
            rates = ", ".join(sorted({row["learning_rate"] for group in groups.values() for row in group}))
            lines += ["", f"## {states} states, test {metric.upper()}", "", f"Learning rate {rates}.", ""]
            lines += [head(["encoders", *models])]
            for subset in dict.fromkeys(key[1] for key in sorted(groups, key=_order)):
                cells = [_cell(groups.get((model, subset), []), metric) for model in models]
                lines.append(f"| {subset} | {' | '.join(cells)} |")
            added = [(model, [_cell_of(v) for v in gains(groups, model, metric)]) for model in models]
            named = ["model", "two less one", "three less one", "three less the best one"]
            lines += _filled("Differences of the means over subsets, paired by seed:", named, added)
        every, pairs = " + ".join(ENCODERS), []
        for ours, theirs in (
            ("concat, cross", "concat"),
            ("momef, cross", "momef"),
            ("momef", "concat"),
            ("iisan", "concat"),
            ("iisan", "momef, cross"),
        ):
            first, second = groups.get((ours, every), []), groups.get((theirs, every), [])
            cells = [_cell_of(paired(first, second, metric)) for metric in METRICS]
            pairs.append((f"{ours} less {theirs}", cells))
        named = ["", *(metric.upper() for metric in METRICS)]
        lines += _filled(f"With all three, test, paired by seed, {states} states:", named, pairs)
    lines += ["", "![accuracy by number of encoders](encoders.png)"]
    return "\n".join([*lines, "", "Drawn by `python -m benchmarks.recipes.tabulate`."]) + "\n"


def _filled(title: str, names: list[str], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    """A table of the rows that say something; nothing where none does."""
    told = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows if any(cells)]
    return ["", title, "", head(names), *told] if told else []


def by_count(groups: Subsets, model: str, metric: str) -> dict[int, dict[str, float]]:
    """Mean over the subsets of 1, 2, 3 encoders, by seed; of a seed that has them all.

    Of one encoder a model with cross terms is the model without.
    """
    found: dict[int, dict[str, float]] = {}
    for size, subsets in ((1, 3), (2, 3), (3, 1)):
        named = model.removesuffix(", cross") if size == 1 else model
        values: dict[str, list[float]] = {}
        for (name, subset), rows in groups.items():
            if name == named and subset.count("+") == size - 1:
                for row in rows:
                    values.setdefault(row["seed"], []).append(float(row[f"test_{metric}"]))
        found[size] = {s: statistics.fmean(v) for s, v in values.items() if len(v) == subsets}
    return found


def gains(groups: Subsets, model: str, metric: str) -> tuple[list[float], list[float], list[float]]:
    """By seed: two encoders less one, three less one, three less the one best on validation."""
    one, two, three = (by_count(groups, model, metric)[size] for size in (1, 2, 3))
    named = model.removesuffix(", cross")
    singles = [rows for (name, subset), rows in groups.items() if name == named and "+" not in subset]
    best: dict[str, float] = {}
    if len(singles) == len(ENCODERS):
        chosen = max(singles, key=lambda rows: statistics.fmean(of(rows, metric, "validation")))
        best = {row["seed"]: float(row[f"test_{metric}"]) for row in chosen}

    def less(first: dict[str, float], second: dict[str, float]) -> list[float]:
        return [first[s] - second[s] for s in first.keys() & second.keys()]

    return less(two, one), less(three, one), less(three, best)


def draw_encoders(rows: Sequence[Row], path: Path) -> None:
    """Test HR@10 against the number of encoders: means over seeds and subsets, and the subsets as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = list(dict.fromkeys(row["states"] for row in rows))
    kinds = [states for states in every if _has_a_line(rows, states)] or every
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(1 + 4 * len(kinds), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, states in zip(axes[0], kinds, strict=True):
        groups = grouped([row for row in rows if row["states"] == states], "model", "encoders")
        for place, (model, colour) in enumerate(zip(MODELS, _COLOURS, strict=True)):
            counts = by_count(groups, model, "hr@10")
            points = [(n, 100 * statistics.fmean(v.values())) for n, v in counts.items() if v]
            if len(points) < 2:
                continue
            axis.plot(*zip(*points, strict=True), color=colour, label=model, linewidth=1.4)
            shift = 0.04 * (place - 2)
            for (name, subset), own in groups.items():
                if name == model:
                    height = 100 * statistics.fmean(of(own, "hr@10"))
                    axis.plot(subset.count("+") + 1 + shift, height, ".", color=colour, alpha=0.5)
        axis.set(xlabel="encoders", xticks=[1, 2, 3], title=f"{states} states")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("test HR@10, %")
    max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[1])).legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _has_a_line(rows: Sequence[Row], states: str) -> bool:
    """Whether some model was trained on these states with all subsets of two numbers of encoders."""
    groups = grouped([row for row in rows if row["states"] == states], "model", "encoders")
    return any(sum(map(bool, by_count(groups, model, "hr@10").values())) > 1 for model in MODELS)


def _order(key: tuple[str, ...]) -> tuple[int, list[int]]:
    names = key[1].split(" + ")
    return len(names), [ENCODERS.index(name) for name in names]


def head(names: Sequence[str]) -> str:
    return f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|"


def _cell(rows: Sequence[Row], metric: str) -> str:
    return f"{spread(of(rows, metric))} ({len(rows)})" if rows else ""


def _cell_of(values: Sequence[float]) -> str:
    return f"{spread(values, signed=True)} ({len(values)})" if values else ""
