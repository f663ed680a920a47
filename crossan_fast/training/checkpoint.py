"""A run's state in one file without pickle: weights, optimizer, random states and progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossan_fast._checks import describe
from crossan_fast._digests import load_tensors, save_tensors
from crossan_fast._files import write_whole
from crossan_fast.config import CrossanConfig
from crossan_fast.model import CrossanModel
from crossan_fast.serialization import model_of, refuse_nonfinite, require_run
from crossan_fast.training.averaging import WeightAverage
from crossan_fast.training.optimizer import load_optimizer_tensors, optimizer_tensors

VERSION = "1"
_MODEL, _OPTIMIZER, _AVERAGE, _RANDOM = "model/", "optimizer/", "average/", "random/"


def save_checkpoint(
    path: Path,
    model: CrossanModel,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    average: WeightAverage | None = None,
    run: str = "",
) -> None:
    """Write everything that continuing bit for bit needs.

    Args:
        progress: JSON values, given back by `load_checkpoint`.
        run: whose state it is, for `load_checkpoint` to compare; empty: nobody's.

    Raises:
        OSError: no room. ValueError: NaN or inf in a tensor, named. The old file is as it was.
    """
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    tensors |= {_OPTIMIZER + name: value for name, value in optimizer_tensors(optimizer).items()}
    if average is not None:
        tensors |= {_AVERAGE + name: value for name, value in average.tensors().items()}
    tensors[_RANDOM + "cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state(device)
    metadata = {
        "version": VERSION,
        "config": model.config.to_json(),
        "progress": json.dumps(progress),
        **({"run": run} if run else {}),
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    refuse_nonfinite(plain)
    write_whole(path, save_tensors(plain, metadata))


def load_checkpoint(
    path: Path,
    model: CrossanModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    run: str = "",
) -> dict[str, Any]:
    """Put a checkpoint's state into model, optimizer and generators; gives its `progress`.

    Args:
        run: whose checkpoint it has to be, where it says; empty: anybody's.

    Raises:
        FileNotFoundError, ValueError: no such file, no checkpoint, a damaged one, or one of another model
            or run. Nothing was put anywhere.
    """
    tensors, metadata = read_checkpoint(path)
    require_run(metadata, run, path)
    if CrossanConfig.from_json(metadata["config"]) != model.config:  # a field that came later has its default
        raise ValueError(f"checkpoint: {path} holds another model than the config describes")
    expected = {_MODEL + name: value for name, value in model.state_dict().items()}
    if average is not None:
        expected |= {_AVERAGE + name: value for name, value in average.tensors().items()}
    expected[_RANDOM + "cpu"] = torch.get_rng_state()
    _require_like(tensors, expected, path)
    load_optimizer_tensors(optimizer, _under(tensors, _OPTIMIZER))
    model.load_state_dict(_under(tensors, _MODEL))
    if average is not None:
        average.load_tensors(_under(tensors, _AVERAGE))
    random = _under(tensors, _RANDOM)
    torch.set_rng_state(random["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


def load_weights(path: Path, *, backend: str = "auto", run: str = "") -> CrossanModel:
    """The model of a checkpoint, for evaluation; errors as `load_checkpoint`."""
    tensors, metadata = read_checkpoint(path)
    require_run(metadata, run, path)
    config = CrossanConfig.from_json(metadata["config"])
    try:
        return model_of(CrossanModel, config, _under(tensors, _MODEL), backend)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"checkpoint: {path}: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint, `config` and `progress` being JSON objects; errors as
    `load_checkpoint`."""
    tensors, metadata = load_tensors(path, "checkpoint")
    if metadata.get("version") != VERSION:
        raise ValueError(f"checkpoint: expected version {VERSION} in {path}, got {metadata.get('version')!r}")
    for entry in ("config", "progress"):
        try:
            if not isinstance(json.loads(metadata[entry]), dict):
                raise ValueError("no JSON object")
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f"checkpoint: {path}: expected its {entry} as JSON, got {type(error).__name__}: {error}"
            ) from error
    refuse_nonfinite(tensors, str(path))
    return tensors, metadata


def _require_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError for the first tensor that a checkpoint lacks, or has of another shape or type."""
    for name, like in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            got = "none" if found is None else describe(found)
            raise ValueError(f"checkpoint: {path}: {name}: expected {describe(like)}, got {got}")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
