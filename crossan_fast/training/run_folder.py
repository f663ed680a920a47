"""A run on disk.

config.yaml        the resolved config
population.json    the items, states and users that it trains on, and the run that it started from
log.jsonl          one line an epoch: losses, seconds, validation metrics
last.safetensors   everything that `--resume` needs, replaced whole after each epoch
best/              config.json and model.safetensors of the best epoch, for `CrossanModel.from_pretrained`; at
                   the end training.json and README.md, a model card (see `crossan_fast.card`)
results.json       metrics with their protocols, and versions; written at the end
tensorboard/       event files, where asked for

Each file but the log, which last.safetensors repeats, carries its own digest (see `crossan_fast._digests`):
one file of all digests would disagree with the others whenever a run is killed between two writes. All that
is read says which run it is of.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import yaml

from crossan_fast._digests import check_text, sealed, sealed_text
from crossan_fast._files import locked, remove_abandoned, write_whole
from crossan_fast._untrusted import parse_yaml, read_settings
from crossan_fast.card import CARD, RECORD
from crossan_fast.model import CrossanModel
from crossan_fast.serialization import CONFIG, WEIGHTS, digest_of_weights, load_model
from crossan_fast.training.checkpoint import load_weights
from crossan_fast.training.population import Population
from crossan_fast.training.train_config import ComputePrecision, TrainConfig, load_config


class RunFolder:
    """Names and formats of a run's files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.population = self.path / "population.json"
        self.log = self.path / "log.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best"
        self.results = self.path / "results.json"
        self.tensorboard = self.path / "tensorboard"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder alone, and remove what killed trainings left in it.

        Raises:
            BlockingIOError: another process trains in it.
        """
        with locked(self.path, "run"):
            files = (self.config, self.population, self.log, self.last, self.results)
            remove_abandoned(self.path, [file.name for file in files])
            if self.best.is_dir():
                remove_abandoned(self.best, (CONFIG, WEIGHTS, RECORD, CARD))
            yield

    def write_config(self, config: TrainConfig, run: str) -> None:
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        write_whole(self.config, sealed_text(text, run))

    def read_config(self) -> TrainConfig:
        """Raises FileNotFoundError where the folder is no run; ValueError for a damaged or foreign file."""
        if not self.config.is_file():
            raise FileNotFoundError(f"run: expected {self.config.name} in {self.path}, found none")
        text = read_settings(self.config, "run")
        found = check_text(text, "run", self.config)
        if found is None:
            _say_once(self.path)
        elif (run := self.run()) and found != run:
            raise ValueError(f"run: {self.config} is of another run ({found}), expected that of {run}")
        try:
            return _as_it_began(load_config(self.config), text, str(self.config))
        except (ValueError, TypeError) as error:
            raise type(error)(f"run: {self.config}: {error}") from error

    def began_with(self) -> ComputePrecision | None:
        """The precision of the run that the folder holds; None where no epoch has ended yet."""
        if not (self.last.exists() and self.config.is_file()):
            return None
        precision = self.read_config().precision
        return None if precision == "auto" else precision

    def read_population(self) -> Population | None:
        """What the run trains on; None where no epoch has ended yet."""
        return Population.read(self.population) if self.last.exists() else None

    def run(self) -> str:
        """What names the run; '' where no epoch has ended yet, or its files say none."""
        population = self.read_population()
        return "" if population is None else population.run

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """The whole log: a resumed run drops lines of an epoch that was cut off."""
        write_whole(self.log, log_of(history))

    def read_log(self) -> list[dict[str, Any]]:
        """An entry an epoch; none where no epoch has ended yet."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def write_results(self, results: dict[str, Any]) -> None:
        write_whole(self.results, json.dumps(sealed(results), indent=2) + "\n")

    def load_model(self, which: Literal["best", "last"] = "best", *, backend: str = "auto") -> CrossanModel:
        """The run's model, on the CPU.

        Raises:
            FileNotFoundError: no epoch has ended yet, or the folder is no run.
            ValueError: a file is damaged, or of another run.
        """
        if which == "last":
            return load_weights(self.last, backend=backend, run=self.run())
        if not self.best.is_dir():
            raise FileNotFoundError(f"run: expected a folder best/ in {self.path}, found none")
        return load_model(CrossanModel, self.best, backend, self.run())

    def load_best(self, best: Mapping[str, Any], *, backend: str = "auto") -> CrossanModel:
        """The model of the best epoch, on the CPU.

        Args:
            best: what a trainer kept of that epoch: its number `epoch` and the digest of its `weights`, which
                runs of before and processes that save nothing lack.

        Raises:
            ValueError: best/ has other weights; and as `load_model`.
        """
        model = self.load_model("best", backend=backend)
        if best.get("weights") not in (None, digest_of_weights(model)):
            raise ValueError(
                f"run: expected the weights of epoch {best['epoch']}, the best, in {self.best}, got others: "
                "of a later epoch, if the run was cut off as it kept that one; resumed to there it ends well"
            )
        return model


def _as_it_began(config: TrainConfig, text: str, place: str) -> TrainConfig:
    """With what a setting that came later was before: ids had no decay of their own."""
    said = (parse_yaml(text, "run", place) or {}).get("optimizer") or {}
    if "id_weight_decay" in said or not config.model.get("id_embedding"):
        return config
    return replace(config, optimizer=replace(config.optimizer, id_weight_decay=None))


def log_of(history: Sequence[Mapping[str, Any]]) -> str:
    """What log.jsonl holds of a run's history."""
    return "".join(json.dumps(entry) + "\n" for entry in history)


@functools.cache
def _say_once(path: Path) -> None:
    warnings.warn(
        f"run: {path} was made before digests were kept, or its config.yaml lost its own: damage of that "
        "file would not show",
        stacklevel=3,
    )


def versions(device: torch.device) -> dict[str, Any]:
    """What a result was made with."""
    from crossan_fast import __version__

    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "crossan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
    }
