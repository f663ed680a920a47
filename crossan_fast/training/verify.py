"""Reading every file of a run and comparing it with its digest and with the others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossan_fast._digests import KEY, check_text, load_tensors, unsealed
from crossan_fast._untrusted import MAX_BYTES, read_json, read_settings
from crossan_fast.serialization import WEIGHTS, require_run
from crossan_fast.training.checkpoint import read_checkpoint
from crossan_fast.training.population import Population
from crossan_fast.training.run_folder import RunFolder, log_of

_MAX_RESULTS_BYTES = 64 << 20


@dataclass(frozen=True)
class RunReport:
    """What `verify_run` found.

    Attributes:
        problems: one line for each damaged or foreign file.
        sound: names of files that are what was written.
        unchecked: of files that have no digest, as earlier versions wrote them.
    """

    problems: list[str] = field(default_factory=list)
    sound: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def verify_run(path: str | Path) -> RunReport:
    """Read all files of a run.

    Raises:
        FileNotFoundError: the folder is no run.
    """
    folder, report = RunFolder(path), RunReport()
    if not folder.config.is_file():
        raise FileNotFoundError(f"run: expected {folder.config.name} in {folder.path}, found none")
    checks = {
        folder.population: _population,
        folder.config: _config,
        folder.last: _last,
        folder.log: _log,
        folder.best: _best,
        folder.results: _results,
    }
    for file, has_digest in checks.items():
        try:
            if file.exists():
                (report.sound if has_digest(folder) else report.unchecked).append(file.name)
        except (ValueError, RuntimeError, OSError) as error:
            report.problems.append(str(error))
    return report


def _population(folder: RunFolder) -> bool:
    Population.read(folder.population)
    return KEY in read_json(folder.population, "run", MAX_BYTES)


def _config(folder: RunFolder) -> bool:
    if check_text(read_settings(folder.config, "run"), "run", folder.config) is None:
        return False
    folder.read_config()
    return True


def _last(folder: RunFolder) -> bool:
    _, metadata = read_checkpoint(folder.last)
    if "run" in metadata and not folder.population.exists():
        raise ValueError(f"run: {folder.population}: expected it beside {folder.last.name}, found none")
    if not folder.best.exists() and any("validation" in entry for entry in _history(folder)):
        raise ValueError(f"run: {folder.best}: expected it beside {folder.last.name}, found none")
    require_run(metadata, folder.run(), folder.last)
    return KEY in metadata


def _log(folder: RunFolder) -> bool:
    """The log may lag by the epoch that a kill cut off; it has no digest, since the checkpoint repeats it."""
    expected = log_of(_history(folder)) if folder.last.exists() else ""
    if not expected.startswith(folder.log.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"run: {folder.log}: expected the history that {folder.last.name} has; train --resume writes it "
            "anew"
        )
    return True


def _best(folder: RunFolder) -> bool:
    folder.load_model("best", backend="eager")
    return KEY in load_tensors(folder.best / WEIGHTS, "run")[1]


def _results(folder: RunFolder) -> bool:
    body = read_json(folder.results, "run", _MAX_RESULTS_BYTES)
    unsealed(body, "run", folder.results)
    return KEY in body


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    progress: dict[str, Any] = json.loads(read_checkpoint(folder.last)[1]["progress"])
    history: list[dict[str, Any]] = progress.get("history", [])
    return history
