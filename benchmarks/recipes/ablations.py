"""Everything that is worth trying on a recipe, one change at a time, unattended.

    python -m benchmarks.recipes.ablations scientific2k --seeds 0
    python -m benchmarks.recipes.ablations scientific2k --list
    python -m benchmarks.recipes.tabulate

The recipe comes first, then each of `ABLATIONS` that fits it, seed by seed; what is recorded is not trained
again, and a run that was cut off goes on. It says before each run how many are left and for about how long.
Of the recipe and of those that drop modalities, what is left of HR@10 when a modality is missing from every
item at test time goes to retention.csv. Data as for `benchmarks.recipes.run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.recipes.caches import RECIPES, Recipe
from benchmarks.recipes.records import RESULTS, Job, append, carry_out, read
from benchmarks.recipes.run import PLAIN, RUNS, jobs
from crossan_fast.cache import HiddenStateCache
from crossan_fast.training import load_config
from crossan_fast.training.trainer import open_trainer

RETENTION = RESULTS / "retention.csv"


@dataclass(frozen=True)
class Ablation:
    """Attributes:
    settings: laid over the recipe's.
    levels: kept of the cache's, evenly spaced; None: all.
    """

    settings: tuple[str, ...] = ()
    levels: int | None = None

    def of(self, recipe: Recipe) -> Recipe:
        return recipe if self.levels is None else replace(recipe, levels=self.levels)


_ITEM = ("model.modality_dropout=0.3",)
_HISTORY = (*_ITEM, "model.modality_dropout_scope=history")
_ADDED = ("model.id_embedding=true", "model.id_fusion=sum")
_PREFIXES = ("split.stride=prefixes", "model.targets=last")

ABLATIONS: dict[str, Ablation] = {
    "ids": Ablation(("model.id_embedding=true",)),
    "ids, decay 10": Ablation(("model.id_embedding=true", "optimizer.id_weight_decay=10")),
    "ids added": Ablation(_ADDED),
    "ids added, decay 10": Ablation((*_ADDED, "optimizer.id_weight_decay=10")),
    "ids added, decay 20": Ablation((*_ADDED, "optimizer.id_weight_decay=20")),
    "ids added, decay 30": Ablation((*_ADDED, "optimizer.id_weight_decay=30")),
    "ids added, decay 150": Ablation((*_ADDED, "optimizer.id_weight_decay=150")),
    "128 dimensions": Ablation(("model.embedding_dim=128",)),
    "128 dimensions, learning rate 1e-3": Ablation(
        ("model.embedding_dim=128", "optimizer.learning_rate=1e-3")
    ),
    "modality dropout by item": Ablation(_ITEM),
    "modality dropout by history": Ablation(_HISTORY),
    "cosine, temperature 0.1": Ablation(("model.scores=cosine", "model.temperature=0.1")),
    "cosine, temperature 0.2": Ablation(("model.scores=cosine", "model.temperature=0.2")),
    "label smoothing": Ablation(("model.label_smoothing=0.1",)),
    "window 20": Ablation(("model.window=20",)),
    "window 50": Ablation(("model.window=50",)),
    "prefixes": Ablation(_PREFIXES),
    "sampled, uniform": Ablation(("model.loss=sampled",)),
    "sampled, by popularity": Ablation(("model.loss=sampled", "model.negative_sampling=popularity")),
    "full softmax": Ablation(("model.loss=full",)),
    "two-layer heads": Ablation(("model.head=two",)),
    "one level": Ablation(levels=1),
    "three levels": Ablation(levels=3),
    "bottleneck 16": Ablation(("model.bottleneck=16",)),
    "bottleneck 256": Ablation(("model.bottleneck=256",)),
    "top 1": Ablation(("model.top_k=1",)),
    "top 1, load balance": Ablation(("model.top_k=1", "model.load_balance=0.01")),
    "load balance": Ablation(("model.load_balance=0.01",)),
    "relu adapters": Ablation(("model.activation=relu",)),
    "no cross terms": Ablation(("model.cross=none",)),
    "cross terms from towers": Ablation(("model.cross=side",)),
    "low-rank cross terms": Ablation(("model.cross_projection=low_rank",)),
    "concat": Ablation(("model.fusion=concat",)),
    "dropout 0.1": Ablation(("model.dropout=0.1",)),
    "dropout 0.5": Ablation(("model.dropout=0.5",)),
    "learning rate 1e-3": Ablation(("optimizer.learning_rate=1e-3",)),
    "learning rate 3e-3": Ablation(("optimizer.learning_rate=3e-3",)),
    "learning rate 3e-3, average 0.995": Ablation(
        ("optimizer.learning_rate=3e-3", "optimizer.average=0.995")
    ),
}


def fitting(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Those of `names` that change something of a recipe."""
    plain, found = load_config(recipe.config), []
    for name in names:
        ablation = ABLATIONS[name]
        fewer = ablation.levels is not None and ablation.levels < recipe.cached_levels
        if fewer or load_config(recipe.config, ablation.settings) != plain:
            found.append(name)
    return found


def plan(recipe: Recipe, names: Sequence[str], overrides: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The recipe and its ablations, a seed's runs before the next seed's."""
    made = []
    for seed in seeds:
        made += jobs(recipe, PLAIN, overrides, [seed])
        for name in names:
            ablation = ABLATIONS[name]
            made += jobs(ablation.of(recipe), PLAIN, [*ablation.settings, *overrides], [seed])
    return made


def measure_retention(planned: Sequence[Job], path: Path) -> None:
    """Append what is left without each modality, of the runs that `planned` names and `path` lacks."""
    for job in planned:
        if job.recorded(read(path) if path.is_file() else []):
            continue
        with open_trainer(load_config(job.config, job.overrides)) as trainer:
            trainer.fit(
                resume=True, progress=False, say=lambda line: None
            )  # at once where it was trained here
            names = trainer.model.config.modality_names
            whole, left = trainer.evaluate("test").metrics, {}
            for name in names if len(names) > 1 else ():
                task = replace(trainer.task, cache=without(trainer.task.cache, name))
                left[name] = task.evaluate(trainer.model, "test", trainer.config.evaluation).metrics
        kept = ("hr@10", "ndcg@10")
        append(
            path,
            [
                {
                    **job.which,
                    "without": name,
                    **{f"test_{metric}": round(found[metric], 6) for metric in kept},
                    **{f"whole_{metric}": round(whole[metric], 6) for metric in kept},
                    "retention_hr@10": round(found["hr@10"] / whole["hr@10"], 4),
                }
                for name, found in left.items()
            ],
        )


def without(cache: HiddenStateCache, name: str) -> HiddenStateCache:
    """The same items, in memory, none of which has modality `name`."""
    ids = torch.arange(cache.num_items + 1)
    states, present = dict(cache.gather(ids)), cache.present.clone()
    present[:, [modality.name for modality in cache.modalities].index(name)] = False
    states[name] = torch.zeros_like(states[name])
    view = HiddenStateCache.from_tensors(states, present, list(cache.item_names))
    view.modalities, view.frames = cache.modalities, cache.frames  # its numbers are the cache's
    return view


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--only", action="extend", nargs="+", choices=ABLATIONS, help="default: all that change something"
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", dest="overrides"
    )
    parser.add_argument("--list", action="store_true", help="name them, and train nothing")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    names = fitting(recipe, args.only or list(ABLATIONS))
    if idle := [name for name in args.only or () if name not in names]:
        print(f"left out, as {args.recipe} is so already: {', '.join(idle)}", file=sys.stderr)
    if args.list:
        for name in names:
            print(f"{name}: {' '.join(ABLATIONS[name].settings) or f'{ABLATIONS[name].levels} levels'}")
        return 0
    planned = plan(recipe, names, args.overrides, args.seeds)
    carry_out(planned, RUNS)
    of = {" ".join([*dropped, *args.overrides]) or PLAIN for dropped in ((), _ITEM, _HISTORY)}
    own = recipe.name + recipe.suffix if not args.overrides else None
    measured = [job for job in planned if job.which["setting"] in of and own in (None, job.which["cache"])]
    measure_retention(measured, RETENTION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
