"""A model on disk: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crossan_fast._digests import digest_of_tensors, load_tensors, save_tensors
from crossan_fast._files import write_whole
from crossan_fast._untrusted import read_settings
from crossan_fast.card import read_record, write_card
from crossan_fast.config import CrossanConfig

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def refuse_nonfinite(tensors: Mapping[str, Tensor], source: str = "") -> None:
    """Raise ValueError for the first of some tensors, on the CPU, that holds NaN or inf.

    Args:
        source: where they come from, for the message; empty: they are to be saved next.
    """
    for name, tensor in tensors.items():
        if _all_finite(tensor):
            continue
        bad = (~tensor.isfinite()).nonzero()
        where = bad[0].tolist()
        others = [other for other, t in tensors.items() if not _all_finite(t)]
        raise ValueError(
            f"{name}: expected finite values{f' in {source}' if source else ' to save'}, got "
            f"{float(tensor[tuple(where)])} at {where}, in "
            f"{len(bad)} of {tensor.numel()} places, and in {len(others) - 1} more of {len(tensors)} tensors"
            + ("; safetensors.torch.load_file reads them as they are" if source else "")
        )


def _all_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # reductions know no float8
    return all(bool(bound.isfinite()) for bound in wide.aminmax())


def digest_of_weights(model: CrossanModel) -> str:
    """Of all that `save_model` writes of the model but its config."""
    return digest_of_tensors({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})


def save_model(model: CrossanModel, folder: Path, run: str = "") -> None:
    """The config first: weights without their config are of no use to anyone.

    Args:
        run: whose model it is, for `load_model` to compare; empty: nobody's.

    Raises:
        ValueError: a parameter or buffer holds NaN or inf; nothing is written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder, got the file {folder}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in state:
        if {"base_layer", "original_module"} & set(name.split(".")):
            raise ValueError(
                f"{name}: holds adapters, expected a plain model: save them by PEFT's model, or save what "
                "its merge_and_unload() gives"
            )
    refuse_nonfinite(state)
    config = model.config.to_json()
    metadata = {"format": "pt", "config": config, **({"run": run} if run else {})}
    write_whole(folder / CONFIG, config)
    write_whole(folder / WEIGHTS, save_tensors(state, metadata))
    record = model.training_record
    if record is not None and record.get("weights") != digest_of_tensors(state):
        record = None  # trained on since
    write_card(folder, model.config, record)


def load_model(
    cls: type[CrossanModel],
    folder: Path,
    backend: str,
    run: str = "",
    dtype: torch.dtype | str = torch.float32,
) -> CrossanModel:
    """What `save_model` wrote, or another program as plain safetensors.

    Args:
        run: whose model it has to be, where the file says; empty: anybody's.
        dtype: of its parameters; `auto`: as they were saved.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError, RuntimeError: a file is damaged, does not fit the other, is of another run, or holds NaN
            or inf.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: expected {name} in {folder}, found none{_elsewhere(folder)}")
    path = folder / CONFIG
    text = read_settings(path, "folder")
    try:
        config = CrossanConfig.from_json(text)
    except (ValueError, TypeError) as error:
        raise type(error)(f"folder: {path}: {error}") from error
    weights, metadata = load_tensors(folder / WEIGHTS, "folder")
    require_run(metadata, run, folder / WEIGHTS)
    try:
        model = model_of(cls, config, weights, backend, dtype)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"folder: {folder / WEIGHTS} and {CONFIG} beside it: {error}") from error
    _require_config(path, text, metadata)
    refuse_nonfinite(weights, str(folder / WEIGHTS))
    record = read_record(folder, config)
    if record is not None and record.get("weights") == digest_of_tensors(weights):
        model.training_record = record
    return model


def record_training(folder: Path, record: Mapping[str, Any]) -> None:
    """Say beside a saved model what a run trained it on and reached: see `crossan_fast.card`."""
    weights, _ = load_tensors(folder / WEIGHTS, "folder")
    config = CrossanConfig.from_json(read_settings(folder / CONFIG, "folder"))
    write_card(folder, config, {**record, "weights": digest_of_tensors(weights)})


def _elsewhere(folder: Path) -> str:
    """Where the model of a run is, or of the runs in a folder; empty where there is none."""
    found = sorted(file.parent for file in [*folder.glob(f"best/{CONFIG}"), *folder.glob(f"*/best/{CONFIG}")])
    if not found:
        return ""
    if found[0].parent == folder:
        return f"; it is a run, expected the folder of its model: {found[0]}"
    return f"; it holds runs, expected the folder of a model: {', '.join(map(str, found[:3]))}"


def require_run(metadata: Mapping[str, str], run: str, path: Path) -> None:
    """Raise ValueError where a file's metadata says another run than `run`; empty: any is fine."""
    found = metadata.get("run", run)
    if run and found != run:
        raise ValueError(f"run: {path} is of another run ({found}), expected a file of this one ({run})")


def _require_config(path: Path, text: str, metadata: Mapping[str, str]) -> None:
    """The config beside weights is the one that they were saved with: a flipped bit is another model."""
    if "config" not in metadata:
        return
    saved, found = json.loads(metadata["config"]), json.loads(text)
    for key in sorted(saved.keys() | found.keys()):
        if saved.get(key) != found.get(key):
            raise ValueError(
                f"{key}: {path} says {found.get(key)!r}, the weights beside it were saved with "
                f"{saved.get(key)!r}; for another model of these weights make it by CrossanModel(config) and "
                "load_state_dict(safetensors.torch.load_file(...))"
            )


def model_of(
    cls: type[CrossanModel],
    config: CrossanConfig,
    weights: Mapping[str, Tensor],
    backend: str,
    dtype: torch.dtype | str = torch.float32,
) -> CrossanModel:
    """The model that `config` describes, with copies of `weights`.

    Nothing of the config's sizes is made before the weights turn out to have them: a config that came with a
    download costs no more than the weights that came with it.

    Args:
        dtype: of its parameters; `auto`: that of its weights.

    Raises:
        ValueError: a size that no weight can have.
        RuntimeError: names or shapes of other weights than the config's.
    """
    _refuse_oversize(config, weights)
    with torch.device("meta"):
        model = cls(config, backend=backend)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name in (name for name, _ in model.named_parameters() if name in weights):
        types[name] = weights[name].dtype if isinstance(dtype, str) else dtype
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
