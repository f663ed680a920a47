"""`crossan-fast demo`: a made-up shop from raw items to recommendations, and what each modality adds."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from crossan_fast.cache import HiddenStateCache, build_cache
from crossan_fast.cli._output import table
from crossan_fast.cli._tiny_encoders import save_tiny_encoders
from crossan_fast.cli.plot import plot as draw_run
from crossan_fast.data import Split, read_items
from crossan_fast.data.shop import MODALITIES, make_shop
from crossan_fast.ops import rank_of_target
from crossan_fast.recommend import recommend
from crossan_fast.training.evaluation import excluded, metrics_of
from crossan_fast.training.task import open_task
from crossan_fast.training.train_config import TrainConfig
from crossan_fast.training.trainer import Trainer

LEVELS = 3
CUTOFFS = (5, 10, 20)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="a synthetic shop end to end: raw items, encoders, cache, training, a table and a plot",
        description="Makes a shop with titles, pictures, clips and sounds, encodes them with four tiny real "
        "architectures, trains with one to four modalities, prints what each adds, and draws what the model "
        "looks at.",
    )
    parser.add_argument("--out", type=Path, default=Path("crossan-fast-demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the shop, the encoders and the training")
    parser.add_argument("--epochs", type=int, default=8, help="at most so many for each set of modalities")


NEEDS = {"transformers": "transformers", "PIL": "Pillow", "matplotlib": "matplotlib"}


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    # Not after minutes of training, of which nothing would be drawn.
    if missing := [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(f"demo needs {', '.join(missing)}: pip install 'crossan-fast[demo]'")
    rows = demo(args.out, seed=args.seed, epochs=args.epochs)
    plot = args.out / "demo.png"
    _plot(rows, plot)
    print(f"\n{plot}: the same as a picture")
    report = draw_run(args.out / "runs" / "+".join(MODALITIES))[-1]
    print(
        f"{report}: what the last model looks at, for a browser. {time.monotonic() - started:.0f} s in all."
    )
    return 0


def demo(
    out: Path, *, seed: int = 0, epochs: int = 8, say: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Run the whole demo in folder `out`, which must be new or empty.

    Returns:
        Test metrics by name of the recommender: popularity, then text, + image, + video, + audio.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out: expected a new or empty folder, {out} holds something")
    shop = make_shop(out / "shop", seed=seed)
    say(f"shop: {len(shop.item_names):,} items with four raw modalities, {len(shop.sequences):,} users")
    items = read_items(out / "shop" / "items.tsv")
    encoders = save_tiny_encoders(out / "encoders", shop.titles, seed)
    specs = [f"{name}={path}:pool=mean:levels={LEVELS}" for name, path in encoders.items()]
    report = build_cache(items, specs, out / "cache", dtype="fp32")
    say(f"cache: {report.added:,} items encoded in {report.seconds:.0f} s")

    rows: dict[str, dict[str, float]] = {}
    for count in range(1, len(MODALITIES) + 1):
        config = TrainConfig.from_dict(
            {
                "cache": str(out / "cache"),
                "users": str(out / "shop" / "users.tsv"),
                "items": str(out / "shop" / "items.tsv"),
                "run": str(out / "runs" / "+".join(MODALITIES[:count])),
                "modalities": list(MODALITIES[:count]),
                "model": {"embedding_dim": 32, "bottleneck": 16, "dropout": 0.1},
                "optimizer": {"learning_rate": 3e-3},
                "evaluation": {"k": list(CUTOFFS)},
                "batch_size": 64,
                "epochs": epochs,
                "patience": 3,
                "seed": seed,
            }
        )
        trainer = Trainer(config, open_task(config))
        if not rows:
            rows["popularity"] = popularity_metrics(trainer.task.split)
        trainer.fit(progress=False, say=lambda line: None)
        name = MODALITIES[0] if count == 1 else f"+ {MODALITIES[count - 1]}"
        rows[name] = dict(trainer.evaluate("test").metrics)
        say(f"trained on {', '.join(MODALITIES[:count])}: test HR@10 {100 * rows[name]['hr@10']:.2f} %")
    say("")
    say(table(_cells(rows)))
    _show_one_user(trainer, shop.titles, say)
    return rows


def popularity_metrics(split: Split) -> dict[str, float]:
    """The same ranking by training interactions alone; ties count against the target."""
    scores = split.train_counts.float()[:, None]
    exclude = excluded(split.history_test, split.test_target, "all_except_target")
    ranks = rank_of_target(scores.new_ones(split.num_users, 1), scores, split.test_target, exclude)
    return metrics_of(ranks, CUTOFFS)


def _cells(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    return [
        {"test, full ranking, in %": name}
        | {key.upper(): f"{100 * value:.2f}" for key, value in metrics.items()}
        for name, metrics in rows.items()
    ]


def _show_one_user(trainer: Trainer, titles: list[str], say: Callable[[str], None]) -> None:
    """What the last model, with every modality, makes of the first user's history."""
    cache: HiddenStateCache = trainer.task.cache
    history: Tensor = trainer.task.split.test_input[0]
    rows = [row for row in history.tolist() if row]
    say(f"\nA user took: {'; '.join(titles[row - 1] for row in rows[-4:])}")
    (found,) = recommend(trainer.model, [rows], cache, k=3)
    say(f"next, perhaps: {'; '.join(titles[r.item - 1] for r in found)}")


def _plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(rows)
    values = [100 * rows[name]["hr@10"] for name in names]
    bars = axes.barh(names[::-1], values[::-1], color=["#2f6f9f"] * (len(names) - 1) + ["#b0b0b0"])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("test HR@10 (%), full ranking of the shop's catalogue")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
