"""How few dimensions are enough: the scientific recipes on caches in bases of fewer and fewer.

    python -m benchmarks.recipes.basis scientific4k --widths 384 192 128 96 64 --seeds 0 1 2
    python -m benchmarks.recipes.tabulate

Makes what is missing, the cache of full width and those in a basis of each width, and trains on each; what
is recorded is not trained again. Seconds of an epoch compare within one machine and number of threads. Data
as for `benchmarks.recipes.run`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from statistics import fmean

from benchmarks.recipes.caches import RECIPES, cache_of
from benchmarks.recipes.records import RESULTS, append, epoch_seconds, read, summary
from benchmarks.results import device_name
from crossan_fast.cache import HiddenStateCache
from crossan_fast.training import RunFolder, load_config
from crossan_fast.training.trainer import open_trainer

DATA = ("scientific", "scientific4k", "microlens50k")
WIDTHS = (384, 192, 128, 96, 64)
BASES = RESULTS / "basis.csv"


def run(data: str, widths: list[int], seeds: list[int], overrides: list[str]) -> int:
    """Train with each seed at each width, and append a row for each run that has none yet."""
    for seed in seeds:
        for width in widths:
            rate = load_config(RECIPES[data].config, overrides).optimizer.learning_rate
            if (data, width, seed, rate) in recorded():
                continue
            recipe = replace(RECIPES[data], basis=width)
            cache, folder = cache_of(recipe, overrides), f"runs/basis/{data}-{width}-{seed}"
            given = [*overrides, f"cache={cache}", f"seed={seed}", f"run={folder}"]
            with open_trainer(load_config(recipe.config, given)) as trainer:
                print(f"{data}, {width} dimensions, seed {seed}: {trainer.task.describe()}", flush=True)
                trainer.fit(resume=True, say=print)
                record(data, trainer.folder, trainer.task.cache)
    return 0


def recorded() -> set[tuple[str, int, int, float]]:
    """Data, width, seed and learning rate of the rows that there are: a recipe of before is another run."""
    rows = read(BASES) if BASES.is_file() else []
    return {(r["data"], int(r["width"]), int(r["seed"]), float(r["learning_rate"])) for r in rows}


def record(data: str, folder: RunFolder, cache: HiddenStateCache) -> None:
    """Append what a finished run's folder, and its cache, hold to the committed file."""
    energies = [fmean(cache.sources.get(m.name, {}).get("energy", [1.0])) for m in cache.modalities]
    which = {
        "device": device_name(cache.device),
        "data": data,
        "width": cache.modalities[0].width,
        "energy": " ".join(f"{m.name}={e:.4f}" for m, e in zip(cache.modalities, energies, strict=True)),
        "megabytes": round(cache.nbytes / 1e6, 1),
        "epoch_seconds": round(epoch_seconds(folder), 2),
    }
    append(BASES, [summary(folder, **which)])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes.basis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    return run(args.data, args.widths, args.seeds, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
