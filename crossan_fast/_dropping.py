"""Modality dropout ◊: which modalities and ids of a training step's items are left out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crossan_fast._sources import Source
from crossan_fast.config import CrossanConfig


def drop_by_item(config: CrossanConfig, source: Source, ids: Tensor) -> Source:
    """One draw an item and step, so that places of one id agree; never an item's last modality.

    Ids are dropped as often, beside: an item may keep its modalities alone, not its id alone.

    Args:
        source: its `present` and `items` are thinned.
        ids: int64 `[N]`, the items; 0 at padding.
    """
    exists = _existing(config, source.present, ids)
    draw = torch.rand(exists.shape, device=exists.device)
    present = _kept(config, exists, draw)
    if not config.id_embedding:
        return replace(source, present=present)
    stay = torch.rand(ids.shape, device=ids.device) >= config.modality_dropout
    return replace(source, present=present, items=torch.where(stay, ids, 0))


def _existing(config: CrossanConfig, present: Tensor | None, ids: Tensor) -> Tensor:
    """Bool `[…, M]`."""
    return (ids != 0)[..., None].expand(*ids.shape, len(config.modalities)) if present is None else present


def _kept(config: CrossanConfig, exists: Tensor, draw: Tensor) -> Tensor:
    """What remains of `exists` `[…, M]` under uniform draws: an item's best drawn modality in any case."""
    draw = draw.masked_fill(~exists, -1)
    best = draw == draw.amax(dim=-1, keepdim=True)
    return exists & ((draw >= config.modality_dropout) | best)
