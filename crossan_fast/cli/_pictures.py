"""Pictures of a run's findings, drawn with matplotlib on a light or a dark ground."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from crossan_fast.cli._findings import MONITOR, Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people of every colour vision, on light and dark ground alike (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_INK = {False: ("#ffffff", "#1f2328", "#d0d7de"), True: ("#161b22", "#e6edf3", "#3d444d")}
_MOST_POINTS = 20_000


def draw(found: Findings, *, dark: bool = False) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of every picture that there is something to show in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'crossan-fast[plot]'") from error
    from matplotlib.figure import Figure

    ground, ink, line = _INK[dark]
    style: Any = {
        "figure.facecolor": ground,
        "axes.facecolor": ground,
        "axes.edgecolor": line,
        "grid.color": line,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        for name, picture in _PICTURES.items():
            figure = Figure(figsize=(7.2, 3.2), layout="constrained")
            if picture(figure, found):
                file = io.BytesIO()
                figure.savefig(file, dpi=144, format="png")
                yield name, file.getvalue()


def _curves(figure: Figure, found: Findings) -> bool:
    if not found.history:
        return False
    left, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in found.history]
    left.plot(epochs, [entry["loss"] for entry in found.history], marker=".", color=_COLOURS[0])
    left.set(title="training loss", xlabel="epoch")
    evaluated = [entry for entry in found.history if entry.get("validation")]
    for colour, metric in zip(_COLOURS, ("hr@10", "ndcg@10"), strict=False):
        values = [100 * entry["validation"][metric] for entry in evaluated]
        right.plot(
            [entry["epoch"] for entry in evaluated], values, marker=".", color=colour, label=metric.upper()
        )
    right.axvline(found.history[-1]["best_epoch"], linestyle=":", color=_COLOURS[4], label="best epoch")
    right.set(title="validation, %", xlabel="epoch")
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.5)
    return True


def _gates(figure: Figure, found: Findings) -> bool:
    left, right = figure.subplots(1, 2)
    explained = found.explained
    _heat(left, explained["gate"], explained["tower"], found)
    left.set_title("gate μ of each level")
    _heat(right, explained["share"], explained["modality"], found)
    right.set_title("share of each level in the result")
    return True


def _cross(figure: Figure, found: Findings) -> bool:
    gates = found.explained["cross_gate"]
    if not gates:
        return False
    figure.set_figheight(max(3.2, 0.9 + 0.26 * len(gates)))
    names = [f"{receiver} ← {sender}" for receiver, sender in gates]
    values = np.stack(list(gates.values()))
    axes = figure.subplots()
    _heat(axes, values, names, found, diverging=True)
    axes.set_title("cross gate tanh(ν): how much of another encoder's state is added")
    return True


def _heat(
    axes: Axes, values: npt.NDArray[Any], names: list[str], found: Findings, diverging: bool = False
) -> None:
    limit = max(float(np.abs(values).max()), 0.1)  # so that what is next to nothing looks so
    low, high, colours = (-limit, limit, "RdBu") if diverging else (0.0, 1.0, "viridis")
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
        axes.text(
            column,
            row,
            f"{round(float(value), 2) + 0.0:.2f}",
            ha="center",
            va="center",
            color=ink,
            fontsize=7,
        )
    axes.set_yticks(range(len(names)), names)
    # Encoders of one depth have one numbering of layers; where they differ, levels are counted.
    layers = {tuple(chosen) for chosen in found.layers.values() if chosen is not None}
    one = layers.pop() if len(layers) == 1 and None not in found.layers.values() else None
    axes.set_xticks(range(values.shape[1]), [str(label) for label in one or range(values.shape[1])])
    axes.set_xlabel("layer of the encoder; 0 is its embedding output" if one else "level")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _experts(figure: Figure, found: Findings) -> bool:
    weights = found.explained["expert_weight"]
    if weights is None or weights.shape[1] == 1:
        return False
    left, right = figure.subplots(1, 2)
    names = found.explained["expert"]
    colours = [_COLOURS[m % len(_COLOURS)] for m in range(len(names))]
    bars = left.barh(names, weights.mean(axis=0), color=colours)
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set(title="mean weight of each expert")
    for m, name in enumerate(names):
        right.hist(
            weights[:, m],
            bins=np.linspace(0, 1, 41),
            histtype="step",
            color=colours[m],
            label=name,
            linewidth=1.4,
        )
    right.set(title="weights over the catalogue", xlabel="weight in an item", ylabel="items")
    right.legend()
    return True


def _without(figure: Figure, found: Findings) -> bool:
    if len(found.without) < 2:
        return False
    axes = figure.subplots()
    names = [f"without {name}" if name else "with all" for name in found.without]
    values = [100 * value for value in found.without.values()]
    bars = axes.barh(names, values, color=[_COLOURS[0], *[_COLOURS[1]] * (len(names) - 1)])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(title=f"test {MONITOR.upper()}, %, without training again")
    return True


def _map(figure: Figure, found: Findings) -> bool:
    figure.set_figheight(5.4)
    axes = figure.subplots()
    weights, names = found.explained["expert_weight"], found.explained["expert"]
    picked = np.arange(len(found.points))
    if len(picked) > _MOST_POINTS:
        picked = np.random.default_rng(0).choice(len(picked), _MOST_POINTS, replace=False)
    points = found.points[picked]
    size = 4 + 16 * np.sqrt(found.counts[picked] / max(found.counts.max(), 1))
    if weights is None or len(names) == 1:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=_COLOURS[0], alpha=0.6, linewidths=0)
    else:
        strongest = weights[picked].argmax(axis=1)
        for m, name in enumerate(names):
            chosen = strongest == m
            if not chosen.any():
                continue
            colour = _COLOURS[m % len(_COLOURS)]
            x, y = points[chosen].T
            axes.scatter(x, y, s=size[chosen], color=colour, alpha=0.6, linewidths=0, label=name)
        axes.legend(title="strongest expert", markerscale=2)
    shown = f"{len(picked):,} of {len(found.points):,} items" if len(picked) < len(found.points) else "items"
    first, second = found.variance
    axes.set(
        title=f"{shown}, larger where taken more often",
        xlabel=f"first principal axis ({first:.0%} of the variance)",
        ylabel=f"second ({second:.0%})",
    )
    return True


_PICTURES: dict[str, Callable[[Figure, Findings], bool]] = {
    "curves": _curves,
    "gates": _gates,
    "cross": _cross,
    "experts": _experts,
    "without": _without,
    "map": _map,
}
