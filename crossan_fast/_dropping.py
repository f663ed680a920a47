"""Modality dropout ◊: which modalities and ids of a training step's items are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from crossan_fast import ops
from crossan_fast._sources import Source
from crossan_fast.config import CrossanConfig
from crossan_fast.ops.deduplicate import first_places


class Variants(NamedTuple):
    """Attributes:
    source: the distinct pairs of an item and what it has left, V of them.
    inputs: int64 `[B, S]`, the pair of each place of a history.
    candidates: int64 `[U]`, the pair that is each distinct item with all that it has.
    counts: int64 `[V]`, how many places have the pair, those of candidates included.
    """

    source: Source
    inputs: Tensor
    candidates: Tensor
    counts: Tensor


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


def drop_by_history(
    config: CrossanConfig, source: Source, unique: ops.Deduplicated, backend: str = "auto"
) -> Variants:
    """Sequential modality dropout (arXiv 2608.10240): one draw a history and modality, and step.

    ◊ Candidates, the targets and negatives that all rows share, keep what they have. An item that would lose
    its last modality keeps, of those that it has, its history's best drawn. Ids are dropped as often, beside.

    An item in two histories may be two things: what is encoded once is a distinct pair of an item and what it
    has left, so that deduplication stays exact.

    Args:
        source: the items of `unique`, U.
        unique: of the batch's ids `[B, S + 1]`.
        backend: of `ops.deduplicate`.
    """
    places, count = unique.slots[:, :-1], len(config.modalities)
    exists, draws = _existing(config, source.present, unique.ids), len(places)
    draw = torch.rand(draws, 1, count, device=places.device)
    kept = _kept(config, exists[places], draw.expand(*places.shape, count))
    with_id = (unique.ids != 0)[:, None]
    if config.id_embedding:
        stay = torch.rand(draws, 1, device=places.device) >= config.modality_dropout
        kept = torch.cat([kept, (with_id[places, 0] & stay)[..., None]], -1)
        exists = torch.cat([exists, with_id], -1)
    # A key is an item with a bit for each thing that it may keep; padding is 0, as it is among ids.
    bits = torch.arange(exists.shape[1], device=places.device)
    left = torch.cat([kept.flatten(0, 1), exists])
    slots = torch.cat([places.flatten(), torch.arange(len(unique.ids), device=places.device)])
    ids = unique.ids[slots]
    keys = torch.where(ids == 0, 0, (ids << len(bits)) + (left.long() << bits).sum(-1))
    capacity = None if keys.device.type == "cpu" else keys.numel() + 1
    distinct = ops.deduplicate(keys, capacity, backend=backend)
    found = (distinct.ids[:, None] >> bits & 1).bool()
    items = distinct.ids >> len(bits)
    if config.id_embedding:
        items = torch.where(found[:, -1], items, 0)
    first = slots[first_places(distinct.slots, len(distinct.ids))]
    pairs = replace(source.repeated(first), present=found[:, :count], items=items)
    weights = torch.cat([(places != 0).flatten().long(), unique.counts])
    counts = torch.zeros_like(distinct.ids).scatter_add_(0, distinct.slots, weights)
    inputs, candidates = distinct.slots.split([places.numel(), len(unique.ids)])
    return Variants(pairs, inputs.reshape(places.shape), candidates, counts)


def _existing(config: CrossanConfig, present: Tensor | None, ids: Tensor) -> Tensor:
    """Bool `[…, M]`."""
    return (ids != 0)[..., None].expand(*ids.shape, len(config.modalities)) if present is None else present


def _kept(config: CrossanConfig, exists: Tensor, draw: Tensor) -> Tensor:
    """What remains of `exists` `[…, M]` under uniform draws: an item's best drawn modality in any case."""
    draw = draw.masked_fill(~exists, -1)
    best = draw == draw.amax(dim=-1, keepdim=True)
    return exists & ((draw >= config.modality_dropout) | best)
