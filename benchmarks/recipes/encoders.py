"""Are more encoders better? Every subset of scientific2k's three, one state each, paired by seed.

    python -m benchmarks.recipes.encoders --seeds 0 1 2 3 4
    python -m benchmarks.recipes.tabulate

Each subset is trained as CROSSAN with either fusion, with cross terms from backbones and without (of one
encoder alone there are none to compare), and as IISAN. A seed's runs come before the next seed's; what is
recorded is not trained again. Data as for `benchmarks.recipes.run`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import combinations

from benchmarks.recipes.caches import RECIPES, cache_of
from benchmarks.recipes.records import RESULTS, Job, carry_out

RECIPE = RECIPES["scientific2k"]
# As the recipe has them, in a basis of few dimensions, and as the encoders gave them.
STATES = {"centred": RECIPE, "centred-128": replace(RECIPE, basis=128), "raw": replace(RECIPE, centred=False)}
ENCODERS = ("minilm", "clip_text", "clip_image")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(ENCODERS, size)]
MODELS: dict[str, tuple[str, ...]] = {
    "concat": ("model.fusion=concat", "model.cross=none"),
    "concat, cross": ("model.fusion=concat", "model.cross=backbone"),
    "momef": ("model.fusion=momef", "model.cross=none"),
    "momef, cross": ("model.fusion=momef", "model.cross=backbone"),
    "iisan": ("model.architecture=iisan",),
}
ROWS = RESULTS / "encoders.csv"


def jobs(
    states: str, models: list[str], sizes: list[int], seeds: list[int], overrides: list[str]
) -> list[Job]:
    """Every model on every subset of these sizes, seed by seed."""
    made = []
    for seed in seeds:
        for subset in SUBSETS:
            for model in models:
                if len(subset) not in sizes or (len(subset) == 1 and model.endswith("cross")):
                    continue
                name = f"{states}-{model.replace(', ', '-')}-{'+'.join(subset)}-{seed}"
                own = (f"modalities=[{', '.join(subset)}]", f"seed={seed}", f"run=runs/encoders/{name}")
                which = {"encoders": " + ".join(subset), "states": states, "model": model, "seed": seed}
                made.append(Job(which, RECIPE.config, (*MODELS[model], *own, *overrides)))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes.encoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--states", choices=STATES, default=next(iter(STATES)))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3], help="numbers of encoders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", dest="overrides"
    )
    args = parser.parse_args()
    cache = cache_of(STATES[args.states], args.overrides)
    settings = [*args.overrides, f"cache={cache}"]
    carry_out(jobs(args.states, args.models, args.sizes, args.seeds, settings), ROWS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
