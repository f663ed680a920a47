"""How few dimensions are enough: the scientific recipes on caches in bases of fewer and fewer.

    python -m benchmarks.recipes.basis scientific4k --widths 384 192 128 96 64 --seeds 0 1 2
    python -m benchmarks.recipes.tabulate

Makes what is missing, the cache of full width and those in a basis of each width, and trains on each; what
is recorded is not trained again. Seconds of an epoch compare within one machine and number of threads. Data
as for `benchmarks.recipes.scientific`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import fmean

from benchmarks.recipes.scientific import RESULTS, append, build_cache, p20, summary
from benchmarks.results import device_name
from crossan_fast.cache import HiddenStateCache, convert_cache
from crossan_fast.training import RunFolder, load_config
from crossan_fast.training.trainer import open_trainer

CONFIGS = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("scientific", "scientific4k")}
# A title there is followed by categories and brand, up to 143 words.
TOKENS = {"scientific": 30, "scientific4k": 128}
WIDTHS = (384, 192, 128, 96, 64)
BASES = RESULTS / "basis.csv"


def cache_of(data: str, width: int, overrides: list[str]) -> Path:
    """The cache of a data set, in a basis of `width` dimensions where that is not all; made where missing."""
    config = load_config(CONFIGS[data], overrides)
    whole = config.path("cache")
    if not (whole / "meta.json").is_file() and build_cache(config, TOKENS[data]):
        raise SystemExit(2)
    if all(m.width == width for m in HiddenStateCache.open(whole).modalities):
        return whole
    folder = whole.with_name(f"{whole.name}-{width}")
    if not folder.exists():
        convert_cache(whole, folder, basis=width)
    return folder


def run(data: str, widths: list[int], seeds: list[int], overrides: list[str]) -> int:
    """Train with each seed at each width, and append a row for each run that has none yet."""
    for seed in seeds:
        for width in widths:
            if (data, str(width), str(seed)) in recorded():
                continue
            cache, folder = cache_of(data, width, overrides), f"runs/basis/{data}-{width}-{seed}"
            given = [*overrides, f"cache={cache}", f"seed={seed}", f"run={folder}"]
            with open_trainer(load_config(CONFIGS[data], given)) as trainer:
                print(f"{data}, {width} dimensions, seed {seed}: {trainer.task.describe()}", flush=True)
                trainer.fit(resume=True, say=print)
                record(data, trainer.folder, trainer.task.cache)
    return 0


def recorded() -> set[tuple[str, str, str]]:
    """Data, width and seed of the rows that there are."""
    if not BASES.is_file():
        return set()
    with BASES.open(newline="", encoding="utf-8") as file:
        return {(row["data"], row["width"], row["seed"]) for row in csv.DictReader(file)}


def record(data: str, folder: RunFolder, cache: HiddenStateCache) -> None:
    """Append what a finished run's folder, and its cache, hold to the committed file."""
    epochs = [json.loads(line)["train_seconds"] for line in folder.log.read_text().splitlines()]
    energies = [fmean(cache.sources.get(m.name, {}).get("energy", [1.0])) for m in cache.modalities]
    which = {
        "device": device_name(cache.device),
        "data": data,
        "width": cache.modalities[0].width,
        "energy": " ".join(f"{m.name}={e:.4f}" for m, e in zip(cache.modalities, energies, strict=True)),
        "megabytes": round(cache.nbytes / 1e6, 1),
        "epoch_seconds": round(p20(epochs), 2),
    }
    append(BASES, [summary(folder, **which)])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes.basis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", choices=CONFIGS)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    return run(args.data, args.widths, args.seeds, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
