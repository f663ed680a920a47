"""What a trained model listens to, as numbers: gates of its levels, weights of its experts item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from crossan_fast import _sources
from crossan_fast._modes import evaluating
from crossan_fast.modules.fusion import Momef
from crossan_fast.modules.linear import bias_of, own, weight_of
from crossan_fast.modules.side_network import Tower
from crossan_fast.ops.fusion import expert_weights

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.model import CrossanModel


@torch.no_grad()
def explain(
    model: CrossanModel, items: Sequence[str | int] | None, cache: HiddenStateCache
) -> dict[str, Any]:
    """Gates and expert weights of a model; arrays are NumPy's, fp32.

    Args:
        model: put in evaluation mode for the call.
        items: names, or rows of the cache (1 … I); None: all that have one of the model's modalities.
        cache: holds the items.

    Returns:
        A dict, of which a table of items and one of levels can be made (n items, M modalities, T towers, L
        levels):

        - `item`: the names, a list of n.
        - `modality`, `tower`: names, lists of M and T; the first M towers are the modalities'.
        - `present`: bool `[n, M]`.
        - `expert`: the experts' names: the modalities', and `id` behind them where it is one.
        - `expert_weight`: `[n, M]`, or `[n, M + 1]` with an id expert, rows summing to 1: what MOMEF's router
          gives to each expert, after `top_k`; 0 where it is absent. None where there is no router
          (`fusion="concat"`).
        - `gate`: μ `[T, L]`.
        - `share`: `[M, L]`: the part of a tower's last h that passed from each level's state, adapters and
          cross terms aside: μ_l · Π_{l' > l} (1 − μ_l').
        - `cross_gate`: `{(receiver, sender): [L]}`, tanh(ν); empty without cross terms.

    Raises:
        KeyError: an unknown name. IndexError: a row out of range. ValueError: no item, one without any
            modality, or a cache without the model's modalities.
    """
    rows = _rows(model, items, cache)
    model._require_rows(cache)
    names = cache.item_names
    present, weights = _of_items(model, rows, cache)
    gates = _gates(model)
    single = gates[: len(model.config.modalities)]
    # What is left of h after each level: the product of 1 − μ of all later ones.
    kept = (1 - single).flip(1).cumprod(1).flip(1).roll(-1, 1)
    kept[:, -1] = 1
    return {
        "item": [names[row] for row in rows.tolist()],
        "modality": list(model.config.modality_names),
        "expert": list(model.config.experts),
        "tower": [tower.name for tower in model.config.towers],
        "present": present.cpu().numpy(),
        "expert_weight": None if weights is None else _plain(weights),
        "gate": _plain(gates),
        "share": _plain(single * kept),
        "cross_gate": {
            (tower, sender): _plain(torch.tanh(gate))
            for tower, parts in model.towers.items()
            for sender, gate in getattr(parts, "cross", {}).items()
        },
    }


def _rows(model: CrossanModel, items: Sequence[str | int] | None, cache: HiddenStateCache) -> Tensor:
    if items is None:
        every = torch.arange(1, cache.num_items + 1)
        bare = _sources.bare_in(model.config, cache, every.device)
        return every if bare is None else every[~bare[1:]]
    if isinstance(items, str) or not len(items):
        raise ValueError(f"items: expected at least one item name or row, got {items!r}")
    rows = [cache.row_of(item) if isinstance(item, str) else int(item) for item in items]
    for row in rows:
        if not 1 <= row <= cache.num_items:
            raise IndexError(f"items: expected rows 1 to {cache.num_items}, got {row}")
    return torch.tensor(rows)


def _of_items(model: CrossanModel, rows: Tensor, cache: HiddenStateCache) -> tuple[Tensor, Tensor | None]:
    """Which modalities each item has, and the weights of their experts where the fusion has such."""
    device = model.item_popularity.device
    _sources.place(cache, device)
    config = model.config
    _sources.refuse_bare(config, cache, rows, "items")
    held = _sources.present_in(config, cache, device)
    rows = rows.to(device)
    present = torch.ones(len(rows), len(config.modalities), dtype=torch.bool, device=device)
    if held is not None:
        present = held[rows]
    if config.fusion == "concat":
        return present, None
    router = cast(Momef, own(model.fusion)).router
    found = []
    with evaluating(model):
        for part in rows.split(_sources.CATALOGUE_CHUNK):
            source = _sources.cached(config, cache, device, part)
            embeddings = model.towers(
                source.states,
                model.heads,
                ids=source.ids,
                scales=source.scales,
                present=source.present,
                backend=model.backend_for("side_network"),
            )
            exists = source.present
            if model.id_embedding is not None and config.id_expert:
                embeddings, exists = model.id_embedding(embeddings, exists, part)
            found.append(
                expert_weights(
                    embeddings,
                    weight_of(router),
                    bias_of(router),
                    present=exists,
                    top_k=config.top_k,
                )
            )
    return present, torch.cat(found)


def _gates(model: CrossanModel) -> Tensor:
    """μ of every tower and level, `[T, L]`."""
    gates: list[Tensor] = [cast(Tower, tower).gate for tower in model.towers.values()]
    return torch.sigmoid(torch.stack(gates) / model.config.gate_temperature)


def _plain(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().float().cpu().numpy()
    return array
