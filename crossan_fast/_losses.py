"""The end of a training step: from what is read of a batch's items to its loss, one function a `loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from crossan_fast import _scores, _sources, distributed, ops
from crossan_fast._dropping import drop_by_history, drop_by_item
from crossan_fast._profiling import span
from crossan_fast._sources import ReadAhead, Source
from crossan_fast.modules.id_embedding import rows_of
from crossan_fast.output import CrossanOutput

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.model import CrossanModel


class Encoded(NamedTuple):
    """Attributes:
    users: `[B, S, d]`.
    by_place: items by place `[B, S + 1, d]`.
    items: distinct ones `[U, d]`.
    balance: what `fusion` says of it.
    log_popularity: of the distinct items, where it came with their rows.
    """

    users: Tensor
    by_place: Tensor
    items: Tensor
    balance: Tensor | None
    log_popularity: Tensor | None


def in_batch(
    model: CrossanModel, item_ids: Tensor, unique: ops.Deduplicated, encoded: Encoded
) -> CrossanOutput:
    """`loss="in_batch"`: a target against the places of the batch.

    Args:
        item_ids: `[B, S + 1]`.
        unique: of `item_ids`.
        encoded: of them.
    """
    users, by_place, embeddings, balance, log_popularity = encoded
    if model.process_group is not None:
        # On the CPU a batch has as many slots as distinct items, equal shapes or not.
        equal = model.equal_batches and item_ids.device.type != "cpu"
        backend = model.backend_for("deduplicate")
        unique, embeddings = distributed.gather_negatives(
            unique, embeddings, model.process_group, equal=equal, backend=backend
        )
    if log_popularity is None or model.process_group is not None:  # else the batch's own
        log_popularity = model._log_popularity(unique.ids)
    loss = _against(model, users, embeddings, unique, log_popularity)
    return CrossanOutput(_total(model, loss, item_ids, balance), users, by_place)


def sampled(
    model: CrossanModel, item_ids: Tensor, cache: HiddenStateCache | None, known: int | None, ahead: ReadAhead
) -> CrossanOutput:
    """`loss="sampled"`: a target against items that are drawn of 1 to `known`, each as often as it was.

    Args:
        item_ids: `[B, S + 1]`.
        ahead: see `Sampler.draw`.
    """
    if cache is None or known is None:
        raise ValueError("cache: loss='sampled' draws from the catalogue, expected a cache, got states")
    unique, counts, log_chance = model._sampler.draw(model, item_ids, cache, known, ahead)
    source = dropped(model, model._read(cache, unique.ids, ReadAhead()), unique.ids)
    users, by_place, embeddings, balance, _ = model._encoded(item_ids, unique, source)
    loss = _against(model, users, embeddings, unique._replace(counts=counts), log_chance)
    return CrossanOutput(_total(model, loss, item_ids, balance), users, by_place)


def full(
    model: CrossanModel, item_ids: Tensor, cache: HiddenStateCache | None, known: int | None
) -> CrossanOutput:
    """`loss="full"`: a target against the catalogue, items 1 to `known` of the cache."""
    config, device = model.config, item_ids.device
    if cache is None or known is None:
        raise ValueError("cache: loss='full' scores the whole catalogue, expected a cache, got states")
    catalogue = torch.arange(known + 1, device=device)
    places, bare = item_ids, _sources.bare_in(config, cache, device)
    if bare is not None:  # what nothing embeds is no candidate
        kept = ~bare[: known + 1]
        catalogue, places = catalogue[kept], torch.where(kept, kept.cumsum(0) - 1, 0)[item_ids]
    embeddings, source, balance = _catalogue(model, catalogue, cache)
    if config.deduplicate:
        by_place = rows_of(embeddings, places)
    else:
        placed = source.repeated(places.reshape(-1))
        assert placed.ids is not None
        read = model._read(cache, placed.ids, ReadAhead())
        placed = replace(read, present=placed.present, items=placed.items)
        by_place = model._encode(placed, None)[0].reshape(*item_ids.shape, -1)
    histories = by_place[:, :-1]
    if drops(model, "history"):
        unique = ops.deduplicate(
            item_ids, ReadAhead().slots(item_ids), backend=model.backend_for("deduplicate")
        )
        histories, _, _ = thinned(model, unique, _sources.cached(config, cache, device, unique.ids))
    users = model.encode_users(histories, item_ids[:, :-1] != 0)
    targets = torch.where(places[:, :-1] != 0, places[:, 1:], 0)
    scored = users
    if config.targets == "last":
        scored, targets = users[:, -1], targets[:, -1]
    with span("loss"):
        loss = ops.full_loss(scored, embeddings, targets, backend=model.backend_for("full_loss"))
        loss = _scores.smooth_full(loss, config.label_smoothing, scored, embeddings, targets)
    return CrossanOutput(_total(model, loss, item_ids, balance), users, by_place)


def drops(model: CrossanModel, scope: str) -> bool:
    """Whether this step drops modalities by `scope`."""
    config = model.config
    return bool(model.training and config.modality_dropout and config.modality_dropout_scope == scope)


def dropped(model: CrossanModel, source: Source, ids: Tensor) -> Source:
    """What a dropout by item leaves of the items `ids`."""
    return drop_by_item(model.config, source, ids) if drops(model, "item") else source


def last_alone(users: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    """Rows whose last place alone has a target, and the same items of their own.

    A target follows an item: with padding between all others but the last two, those stay what a row holds,
    and are targets no more.

    Args:
        users: `[B, S, d]`.
        places: `[B, S + 1, …]`, ids, slots or embeddings.

    Returns:
        `[B, 2S - 1, d]`, and `[B, 2S, …]` each.
    """
    apart = [pad(users[:, -1:], (0, 0, 2 * users.shape[1] - 2, 0))]
    for each in places:
        spaced = torch.stack([each[:, :-1], torch.zeros_like(each[:, :-1])], 2).flatten(1, 2)
        apart.append(torch.cat([spaced[:, :-1], each[:, -1:]], 1))
    return tuple(apart)


def _against(
    model: CrossanModel, users: Tensor, items: Tensor, unique: ops.Deduplicated, log_popularity: Tensor
) -> Tensor:
    """The loss over distinct columns, smoothed; arguments as `ops.in_batch_loss`."""
    slots = unique.slots
    if model.config.targets == "last":
        users, slots = last_alone(users, slots)
        unique = unique._replace(slots=slots)
    with span("loss"):
        columns = (users, items, slots, unique.counts, log_popularity)
        loss = ops.in_batch_loss(*columns, backend=model.backend_for("in_batch_loss"))
        smoothing = model.config.label_smoothing
        return _scores.smooth_in_batch(loss, smoothing, users, items, unique, log_popularity)


def by_place(
    model: CrossanModel, item_ids: Tensor, unique: ops.Deduplicated, source: Source
) -> CrossanOutput:
    """`in_batch` with an embedding and a column for every place."""
    if model.process_group is not None:
        raise ValueError("deduplicate: process_group shares distinct items, expected true, got false")
    flat = unique.slots.reshape(-1)
    embeddings, balance = model._encode(source.repeated(flat), (flat != 0).to(torch.int64))
    by_place = embeddings.reshape(*item_ids.shape, -1)
    users = model.encode_users(by_place[:, :-1], item_ids[:, :-1] != 0)
    columns: tuple[Tensor, ...] = (users, by_place, item_ids, model._log_popularity(unique.ids)[unique.slots])
    if model.config.targets == "last":
        columns = last_alone(*columns)
    with span("loss"):
        loss = ops.in_batch_loss_by_place(*columns)
    return CrossanOutput(_total(model, loss, item_ids, balance), users, by_place)


def _catalogue(
    model: CrossanModel, catalogue: Tensor, cache: HiddenStateCache
) -> tuple[Tensor, Source, Tensor | None]:
    """Embeddings of the rows `catalogue` of a cache, what a dropout by item left of them, and the balance."""
    config, device = model.config, catalogue.device
    counts = (catalogue != 0).to(torch.int64)
    held = _sources.present_in(config, cache, device)
    exists = None if held is None else held[catalogue]
    source = dropped(model, Source((), None, catalogue, exists, catalogue), catalogue)
    if not model._reads_states:
        source = replace(model._read(cache, catalogue, ReadAhead()), present=source.present)
        embeddings, balance = model._encode(source, counts)
        return embeddings, source, balance
    _sources.place(cache, device)
    if _sources.read_by_id(cache, device):
        ids = None if len(catalogue) == cache.num_items + 1 else catalogue
        read = _sources.cached(config, cache, device, ids)
        source = replace(read, present=source.present, items=source.items)
        embeddings, balance = model._encode(source, counts)
    else:
        chunks = _sources.embed_in_chunks(model._embed, config, cache, source, _sources.CATALOGUE_CHUNK)
        embeddings, balance = model._fuse(chunks, source, counts)
    return embeddings, source, balance


def thinned(
    model: CrossanModel, unique: ops.Deduplicated, source: Source
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Histories' items `[B, S, d]` with what a dropout by history leaves of them; the distinct items `[U, d]`
    with all that they have; the balance."""
    pairs = drop_by_history(model.config, source, unique, model.backend_for("deduplicate"))
    embeddings, balance = model._encode(pairs.source, pairs.counts)
    return rows_of(embeddings, pairs.inputs), rows_of(embeddings, pairs.candidates), balance


def _total(model: CrossanModel, loss: Tensor, item_ids: Tensor, balance: Tensor | None) -> Tensor:
    config = model.config
    if model.process_group is not None:
        counted = item_ids if config.targets == "all" else item_ids[:, -2:]
        loss = loss * distributed.row_share(counted, model.process_group)
    if balance is None or not config.load_balance:
        return loss
    return loss + config.load_balance * balance
