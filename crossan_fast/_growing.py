"""A model with one modality more, which starts close to where the model was, or one fewer.

What is trained already is kept by name; fusion's rows and columns are put where their experts now stand.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crossan_fast._checks import describe, nearest
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.modules.fusion import Momef

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

# Of a new expert at first, at most. At 1e-7 it had no weight after some hundred steps, Adam's eps being
# larger than its gradients; at 0.01 it has, and embeddings start off by about as much.
SHARE = 0.01


@torch.no_grad()
def extend(model: CrossanModel, modality: Modality, share: float, freeze: bool) -> CrossanModel:
    """See `CrossanModel.extend`."""
    if not isinstance(share, float | int) or not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    if model.config.top_k is not None:
        raise ValueError(
            f"top_k: an expert with next to no weight would never be chosen, expected None, got "
            f"{model.config.top_k}"
        )
    if not isinstance(modality, Modality):
        raise TypeError(f"modality: expected Modality, got {describe(modality)}")
    grown = _like(model, replace(model.config, modalities=(*model.config.modalities, modality)))
    kept = _carry(model, grown)
    fusion = grown.fusion
    if isinstance(fusion, Momef):
        new = grown.config.experts.index(modality.name)
        weight, bias = fusion.router.weight, fusion.router.bias
        # The mean of the old logits is at most their logsumexp − log E, E being how many there are.
        weight[new], bias[new] = weight[kept].mean(0), bias[kept].mean() + math.log(share * len(kept))
    if freeze:
        held = {name for name, _ in model.named_parameters() if name.startswith(("towers.", "heads."))}
        for name, parameter in grown.named_parameters():
            parameter.requires_grad_(name not in held)
    return grown


@torch.no_grad()
def remove(model: CrossanModel, name: str) -> CrossanModel:
    """See `CrossanModel.remove`."""
    config = model.config
    if name not in config.modality_names:
        raise ValueError(
            f"name: expected one of {list(config.modality_names)}, got {name!r}"
            f"{nearest(str(name), config.modality_names)}"
        )
    if config.architecture == "iisan":
        raise ValueError(
            f"name: {name!r} has part in towers of pairs, which would go with it; architecture='iisan' "
            "removes none"
        )
    left = tuple(modality for modality in config.modalities if modality.name != name)
    smaller = _like(model, replace(config, modalities=left))
    _carry(model, smaller)
    return smaller


def _like(model: CrossanModel, config: CrossanConfig) -> CrossanModel:
    """A fresh model of `config` in the place, type and modes of another."""
    weight = model.sequence_encoder.position.weight
    fresh = type(model)(config, backend=model.backend).to(weight.device, weight.dtype)
    modes = {name: part.training for name, part in model.named_modules()}
    for name, part in fresh.named_modules():
        part.training = modes.get(name, model.training)
    return fresh


def _carry(old: CrossanModel, new: CrossanModel) -> list[int]:
    """Give `new` what `old` has by name, with zeros in fusion from a new part to an old one.

    Returns:
        Which parts of `new`'s fusion `old` has.
    """
    wanted = new.state_dict().keys()
    shared = {n: t for n, t in old.state_dict().items() if n in wanted and not n.startswith("fusion.")}
    new.load_state_dict(shared, strict=False)
    new._catalogue = old._catalogue
    new.process_group, new.equal_batches = old.process_group, old.equal_batches
    here, there = _parts(new), _parts(old)
    kept = [i for i, name in enumerate(here) if name in there]
    from_ = [there.index(here[i]) for i in kept]
    fresh, trained = new.fusion, old.fusion
    if isinstance(fresh, Momef) and isinstance(trained, Momef):
        fresh.router.bias[kept] = trained.router.bias[from_]
        for own, other in zip(fresh.experts.parameters(), trained.experts.parameters(), strict=True):
            own[kept] = other[from_]
        fresh.router.weight[kept] = _moved(trained.router.weight[from_], len(there), len(here), kept, from_)
    elif isinstance(fresh, nn.Linear) and isinstance(trained, nn.Linear):
        fresh.bias.copy_(trained.bias)
        fresh.weight.copy_(_moved(trained.weight, len(there), len(here), kept, from_))
    return kept


def _parts(model: CrossanModel) -> list[str]:
    """What a model's fusion joins, by name."""
    if isinstance(model.fusion, Momef):
        return list(model.config.experts)
    towers = [tower.name for tower in model.config.towers]
    return [*towers, "id"] if model.config.id_expert else towers


def _moved(weight: Tensor, before: int, after: int, kept: list[int], from_: list[int]) -> Tensor:
    """Columns `[out, before · d]` as `[out, after · d]`: parts `from_` at `kept`, zeros elsewhere."""
    parts = weight.unflatten(1, (before, -1))
    moved = parts.new_zeros(len(weight), after, parts.shape[2])
    moved[:, kept] = parts[:, from_]
    return moved.flatten(1)
