"""A model on disk: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from crossan_fast._files import write_whole
from crossan_fast._untrusted import read_settings
from crossan_fast.config import CrossanConfig

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def refuse_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first of some tensors, on the CPU, that holds NaN or inf; to be saved next."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if all(bound.isfinite() for bound in tensor.aminmax()):
            continue
        bad = (~tensor.isfinite()).nonzero()
        where = bad[0].tolist()
        others = [other for other, t in tensors.items() if not bool(t.isfinite().all())]
        raise ValueError(
            f"{name}: expected finite values to save, got {float(tensor[tuple(where)])} at {where}, in "
            f"{len(bad)} of {tensor.numel()} places, and in {len(others) - 1} more of {len(tensors)} tensors"
        )


def save_model(model: CrossanModel, folder: Path) -> None:
    """The config first: weights without their config are of no use to anyone.

    Raises:
        ValueError: a parameter or buffer holds NaN or inf; nothing is written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder, got the file {folder}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    refuse_nonfinite(state)
    write_whole(folder / CONFIG, model.config.to_json())
    write_whole(folder / WEIGHTS, save(state, metadata={"format": "pt"}))


def load_model(cls: type[CrossanModel], folder: Path, backend: str) -> CrossanModel:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: expected {name} in {folder}, found none")
    config = CrossanConfig.from_json(read_settings(folder / CONFIG, "folder"))
    return model_of(cls, config, load_file(folder / WEIGHTS), backend)


def model_of(
    cls: type[CrossanModel], config: CrossanConfig, weights: Mapping[str, Tensor], backend: str
) -> CrossanModel:
    """The model that `config` describes, with copies of `weights`.

    Nothing of the config's sizes is made before the weights turn out to have them: a config that came with a
    download costs no more than the weights that came with it.

    Raises:
        ValueError: a size that no weight can have.
        RuntimeError: names or shapes of other weights than the config's.
    """
    _refuse_oversize(config, weights)
    with torch.device("meta"):
        model = cls(config, backend=backend)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    copies = {name: tensor.to(types.get(name), copy=True) for name, tensor in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model


def _refuse_oversize(config: CrossanConfig, weights: Mapping[str, Tensor]) -> None:
    """Every block and tower has weights of its own; every size is a dimension of some weight."""
    numbers = sum(tensor.numel() for tensor in weights.values())
    bounds = {"blocks": len(weights), "embedding_dim": numbers, "bottleneck": numbers, "window": numbers}
    sizes = [(name, getattr(config, name), bound) for name, bound in bounds.items()]
    sizes.append(("modalities", len(config.towers), len(weights)))
    for modality in config.modalities:
        sizes += [(f"modalities: {modality.name!r}", n, numbers) for n in (modality.width, modality.levels)]
    for name, size, bound in sizes:
        if size > bound:
            raise ValueError(
                f"{name}: the config says {size}, expected a size that the {len(weights)} weights "
                f"({numbers} numbers) beside it can have"
            )
