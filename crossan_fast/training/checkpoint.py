"""A run's state in one file without pickle: weights, optimizer, random states and progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crossan_fast._files import write_whole
from crossan_fast.config import CrossanConfig
from crossan_fast.model import CrossanModel
from crossan_fast.serialization import model_of, refuse_nonfinite
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
) -> None:
    """Write everything that continuing bit for bit needs.

    Args:
        progress: JSON values, given back by `load_checkpoint`.

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
    metadata = {"version": VERSION, "config": model.config.to_json(), "progress": json.dumps(progress)}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    refuse_nonfinite(plain)
    write_whole(path, save(plain, metadata=metadata))


def load_checkpoint(
    path: Path,
    model: CrossanModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's state into model, optimizer and generators; gives its `progress`.

    Raises:
        FileNotFoundError, ValueError: no such file, no checkpoint, or one of another model.
    """
    tensors, metadata = _read(path)
    if json.loads(metadata["config"]) != json.loads(model.config.to_json()):
        raise ValueError(f"checkpoint: {path} holds another model than the config describes")
    model.load_state_dict(_under(tensors, _MODEL))
    load_optimizer_tensors(optimizer, _under(tensors, _OPTIMIZER))
    if average is not None:
        average.load_tensors(_under(tensors, _AVERAGE))
    random = _under(tensors, _RANDOM)
    torch.set_rng_state(random["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


def load_weights(path: Path, *, backend: str = "auto") -> CrossanModel:
    """The model of a checkpoint, for evaluation; errors as `load_checkpoint`."""
    tensors, metadata = _read(path)
    config = CrossanConfig.from_json(metadata["config"])
    return model_of(CrossanModel, config, _under(tensors, _MODEL), backend)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error
    if metadata.get("version") != VERSION or "progress" not in metadata:
        raise ValueError(f"checkpoint: expected version {VERSION} in {path}, got {metadata.get('version')!r}")
    return tensors, metadata
