"""Runs of the recipes as rows of committed files: trained once, appended as they end."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.results import FOLDER as RESULTS
from benchmarks.results import device_name
from crossan_fast.training import RunFolder, load_config
from crossan_fast.training.trainer import Trainer, open_trainer

CPU = torch.device("cpu")
Row = dict[str, str]
Finished = Callable[[Trainer], None]


@dataclass(frozen=True)
class Job:
    """One run: what its row says it is, what it changes of a recipe's config, and where it lies."""

    which: dict[str, Any]
    config: Path
    overrides: tuple[str, ...]

    def recorded(self, rows: Iterable[Row]) -> bool:
        """Whether a row says the same of itself."""
        return any(all(row[key] == str(value) for key, value in self.which.items()) for row in rows)


def carry_out(
    jobs: Sequence[Job], path: Path, say: Callable[[str], None] = print, finished: Finished | None = None
) -> None:
    """Train what has no row in `path` yet, a row as each ends; says what is to do and for how long.

    Args:
        finished: called with the trainer after a run, behind its row.
    """
    rows = read(path) if path.is_file() else []
    todo = [job for job in jobs if not job.recorded(rows)]
    seconds = [float(row["train_seconds"]) for row in rows if any(job.recorded([row]) for job in jobs)]
    for index, job in enumerate(todo):
        left = len(todo) - index
        about = f"about {left * fmean(seconds) / 60:.0f} min" if seconds else "time known after the first"
        name = " ".join(f"{key}={value}" for key, value in job.which.items() if value != "")
        say(f"{left} of {len(jobs)} runs to go, {about}: {name}")
        with open_trainer(load_config(job.config, job.overrides)) as trainer:
            results = trainer.fit(resume=True, progress=False, say=lambda line: None)
            append(path, [summary(trainer.folder, **job.which)])
            if finished is not None:
                finished(trainer)
        seconds.append(results["train_seconds"])


def summary(folder: RunFolder, **which: Any) -> dict[str, Any]:
    """A finished run as a row: when and on what, `which` it is, how it was trained, its metrics.

    `test_ties_` stands before those of the test as they are with what ties in random order.
    """
    config = folder.read_config()
    results = json.loads(folder.results.read_text())
    versions, test = results["versions"], results["test"]
    row = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _commit(),
        "device": device_name(CPU) if versions["device"].startswith("cpu") else versions["device"],
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
    at_random = test.get("ties_at_random") or test["metrics"]
    return row | {f"test_ties_{name}": round(at_random[name], 6) for name in ("hr@10", "ndcg@10")}


def epoch_rows(folder: RunFolder, **which: Any) -> list[dict[str, Any]]:
    """A run's curve: a row for each epoch that was validated."""
    seed, seconds, rows = folder.read_config().seed, 0.0, []
    for line in folder.log.read_text().splitlines():
        entry = json.loads(line)
        seconds += entry["train_seconds"]
        if "validation" not in entry:
            continue
        rows.append(
            {
                **which,
                "seed": seed,
                "epoch": entry["epoch"],
                "train_seconds": round(seconds, 1),
                "loss": round(entry["loss"], 5),
                "validation_hr@10": round(entry["validation"]["hr@10"], 6),
                "validation_ndcg@10": round(entry["validation"]["ndcg@10"], 6),
            }
        )
    return rows


def epoch_seconds(folder: RunFolder) -> float:
    """The 20th percentile of a run's epochs: one that other work of a shared machine did not delay."""
    return p20([json.loads(line)["train_seconds"] for line in folder.log.read_text().splitlines()])


def p20(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.2 * (len(seconds) - 1))]


def read(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows at a file's end, in the order of its own columns where it has some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"
