"""A batch as a model takes it: the checks of its ids, and where its states come from.

That is dense tensors, a cache that the op reads by id, or rows gathered from one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossan_fast._checks import check_tensor, describe, nearest, refuse_path
from crossan_fast.cache.staging import Rows
from crossan_fast.cache.validate import FLOATS, first_bad_level, nonfinite_rows
from crossan_fast.config import CrossanConfig
from crossan_fast.ops.deduplicate import Deduplicated, first_places

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache

_ID_DTYPES = (torch.int64, torch.int32)
# Items of a catalogue that are encoded at once: their states are on the device where the cache is not.
CATALOGUE_CHUNK = 2048
# Gives states `{name: [U, L, D_m]}` of the rows `[U]` of a catalogue.
Encoder = Callable[[Tensor], Mapping[str, Tensor]]
# What `cache.prefetch` or `cache.prefetch_stored` read ahead.
Gathered = Mapping[str, Tensor] | Rows


@dataclass(frozen=True)
class ReadAhead:
    """What is known of a batch before its step: from `crossan_fast.training.feed` to the model.

    Attributes:
        gathered: the states of its distinct ids; None: the model reads them.
        capacity: how many distinct ids there are at most, padding counted; None: not known.
    """

    gathered: Gathered | None = None
    capacity: int | None = None

    def slots(self, item_ids: Tensor) -> int | None:
        """How many slots to make for the ids of the batch; None: as many as are distinct.

        On a GPU every place may be distinct: a known shape costs less than asking the device.
        """
        if item_ids.device.type == "cpu":
            return None
        most = item_ids.numel() + 1
        if self.gathered is not None:
            states = self.gathered.states if isinstance(self.gathered, Rows) else self.gathered
            return min(next(iter(states.values())).shape[0], most)
        return most if self.capacity is None else min(self.capacity, most)


@dataclass(frozen=True)
class Source:
    """What the side network reads for N items.

    Attributes:
        states: per modality of the config `[R, L, D_m]`.
        scales: per modality fp32 `[R, L]`, for int8 and fp8 states alone.
        ids: int64 `[N]`, the row of `states` that is each item's; None: all R, in order.
        present: bool `[N, M]`; None: every item has every modality.
        items: int64 `[N]`, each item's row in the catalogue, 0 where it does without its id; None: unknown.
    """

    states: Sequence[Tensor]
    scales: Sequence[Tensor] | None
    ids: Tensor | None
    present: Tensor | None
    items: Tensor | None = None

    def repeated(self, slots: Tensor) -> Source:
        """Items `slots` `[n]` of these, in that order and as often as they come."""
        ids = slots if self.ids is None else self.ids[slots]
        present, items = (None if rows is None else rows[slots] for rows in (self.present, self.items))
        return replace(self, ids=ids, present=present, items=items)


def dense(
    config: CrossanConfig, states: Mapping[str, Tensor], present: Tensor | None, leading: int
) -> Source:
    """States given as tensors with `leading` dimensions before `[L, D_m]`; see `CrossanModel`'s methods.

    Raises:
        ValueError, TypeError: names, shapes, dtypes or devices that do not fit.
    """
    names = config.modality_names
    if not isinstance(states, Mapping):
        raise TypeError(f"states: expected tensors by modality name, {list(names)}, got {describe(states)}")
    for name in states:
        if name not in names:
            raise ValueError(f"states: unknown modality {name!r}{nearest(name, names)}")
    if missing := [name for name in names if name not in states]:
        raise ValueError(f"states: expected {list(names)}, {missing} missing")
    first = states[names[0]]
    for modality in config.modalities:
        shape = (*[None] * leading, modality.levels, modality.width)
        state = check_tensor(f"states[{modality.name!r}]", states[modality.name], shape)
        if not state.is_floating_point():
            raise TypeError(f"states[{modality.name!r}]: expected a floating type, got {describe(state)}")
        if state.shape[:leading] != first.shape[:leading]:
            raise ValueError(
                f"states[{modality.name!r}]: expected {list(first.shape[:leading])} first as in "
                f"states[{names[0]!r}], got {describe(state)}"
            )
    if present is not None:
        shape = (*first.shape[:leading], len(names))
        check_tensor("present", present, shape, dtypes=(torch.bool,), device=first.device)
        present = present.reshape(-1, len(names))
    return Source([states[name].flatten(0, leading - 1) for name in names], None, None, present)


def of_batch(
    config: CrossanConfig, states: Mapping[str, Tensor], present: Tensor | None, unique: Deduplicated
) -> Source:
    """The distinct items of a batch whose places have states `[B, S + 1, L, D_m]`, in the order of `unique`.

    Raises:
        ValueError, TypeError: as `dense`; on the CPU also an item with no modality, and NaN or inf.
    """
    source = dense(config, states, present, leading=2)
    places = first_places(unique.slots, len(unique.ids))
    exists = None if source.present is None else source.present[places]
    if exists is not None and exists.device.type == "cpu":  # on a GPU the answer would have to be waited for
        refuse_empty(exists | (unique.ids == 0)[:, None], "item_ids: item {}", unique.ids)
    source = Source(source.states, None, places, exists, unique.ids)
    refuse_nonfinite(config, source, lambda n: f"that of item {int(unique.ids[n])}")
    return source


def without_cache(
    config: CrossanConfig,
    states: Mapping[str, Tensor] | None,
    present: Tensor | None,
    encoders: Sequence[Encoder] | None,
    unique: Deduplicated,
) -> Source:
    """The distinct items of a batch, of states or of encoders: `check_given` saw to it that there is one."""
    if encoders is not None:
        return from_encoders(config, encoders, unique.ids)
    assert states is not None
    return of_batch(config, states, present, unique)


def from_encoders(config: CrossanConfig, encoders: Sequence[Encoder], ids: Tensor) -> Source:
    """The items `ids` `[U]`, whose states are made here, without gradient, by encoders that run now.

    Raises:
        ValueError, TypeError: as `dense`, of what the encoders gave together; on the CPU also NaN or inf.
    """
    found: dict[str, Tensor] = {}
    # On a GPU there may be a slot for every place of the batch; behind the items' are zeros.
    asked = ids[: min(int(ids.count_nonzero()) + 1, len(ids))]
    with torch.no_grad():
        for index, encoder in enumerate(encoders):
            made = encoder(asked.clone())
            if not isinstance(made, Mapping):
                raise TypeError(
                    f"encoders[{index}]: expected states by modality name, got {type(made).__name__}"
                )
            if twice := found.keys() & made.keys():
                raise ValueError(f"encoders[{index}]: gave {sorted(twice)}, which one before it gave, too")
            found |= {name: _plain(states) for name, states in made.items()}
    if lacking := [name for name in config.modality_names if name not in found]:
        raise ValueError(f"encoders: expected one that gives {lacking}, got states of {list(found)}")
    source = dense(config, found, None, leading=1)
    for name, states in zip(config.modality_names, source.states, strict=True):
        if len(states) != len(asked) or states.device != ids.device:
            raise ValueError(
                f"encoders: states of {name!r}: expected a row for each of {len(asked)} ids on {ids.device}, "
                f"got {describe(states)}"
            )
    if len(asked) < len(ids):
        slots = torch.arange(len(ids), device=ids.device)
        source = replace(source, ids=slots.where(slots < len(asked), 0))
    source = replace(source, items=ids)
    refuse_nonfinite(config, source, lambda n: f"that of item {int(ids[n])}")
    return source


def _plain(states: object) -> Any:
    """States that autograd may keep, and whose maker it does not follow."""
    if not isinstance(states, Tensor):
        return states  # is refused by name
    return states.clone() if states.is_inference() else states.detach()


def check_ids(config: CrossanConfig, item_ids: Tensor, device: torch.device, alone: bool) -> None:
    """Raise unless a batch's ids `[B, S + 1]` are rows that a model on `device` can train on.

    Args:
        alone: no other process has rows of the batch.
    """
    check_tensor("item_ids", item_ids, (None, None), dtypes=_ID_DTYPES, device=device)
    places = item_ids.shape[1]
    if not 2 <= places <= config.window + 1:
        raise ValueError(
            f"item_ids: expected 2 to window + 1 = {config.window + 1} places, got {describe(item_ids)}"
        )
    # On a GPU these checks would wait for the device at every step; the loss is 0 there instead.
    if item_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        if alone and not ((item_ids[:, :-1] != 0) & (item_ids[:, 1:] != 0)).any():
            raise ValueError(f"item_ids: expected a row with a target, got none in {describe(item_ids)}")
        if (item_ids[:, :-1].ne(0) & item_ids[:, 1:].eq(0)).any():
            raise ValueError("item_ids: expected padding (0) on the left only, got it after an item")


def refuse_padding_behind(mask: Tensor) -> None:
    """Raise for a mask bool `[B, S]` on the CPU with padding behind a real item; as in `check_ids`."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((wrong := (mask[:, :-1] & ~mask[:, 1:]).any(dim=1)).any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            "mask: expected padding (False) on the left only, as real items stand at the end, got it after "
            f"an item in row {row}"
        )


def check_range(item_ids: Tensor, known: int, cache: HiddenStateCache | None) -> None:
    """Raise unless ids on the CPU are rows 0 to `known`."""
    if item_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = item_ids.aminmax()
        if low < 0 or high > known:
            of = "" if cache is not None and known == cache.num_items else ", the rows of item_popularity"
            raise ValueError(f"item_ids: expected ids in 0 to {known}{of}, got {int(low)} to {int(high)}")


def check_given(
    states: Mapping[str, Tensor] | None,
    cache: HiddenStateCache | None,
    present: Tensor | None,
    gathered: Gathered | None,
    encoders: Sequence[Encoder] | None,
    loss: str,
) -> None:
    """Raise unless the arguments of `CrossanModel.forward` say once where a batch's states are."""
    refuse_path(cache)
    sources = {"states": states, "cache": cache, "encoders": encoders}
    if len(given := [name for name, source in sources.items() if source is not None]) != 1:
        raise ValueError(
            f"states, cache, encoders: expected one of them, got {' and '.join(given) or 'none'}"
        )
    if encoders is not None:
        if not isinstance(encoders, list | tuple | torch.nn.ModuleList) or not all(map(callable, encoders)):
            raise TypeError(
                "encoders: expected a list of functions from ids to states by modality name, got "
                f"{type(encoders).__name__}"
            )
        if loss != "in_batch":
            raise ValueError(f"encoders: go with loss='in_batch', which takes a batch's items; got {loss!r}")
    if present is not None and states is None:
        raise ValueError("present: goes with states; a cache holds its own, encoders give every modality")
    if gathered is not None and cache is None:
        raise ValueError("gathered: goes with cache, which it was read from; got none")
    if gathered is not None and loss != "in_batch":
        raise ValueError(
            f"gathered: goes with loss='in_batch', which reads a batch's items alone; got {loss!r}"
        )


def refuse_empty(present: Tensor, what: str, names: Tensor | None = None) -> None:
    """Raise for an item without any modality; `what` has a place for its name, or its row."""
    empty = ~present.any(dim=1)
    if not torch.compiler.is_compiling() and bool(empty.any()):
        row = int(empty.nonzero()[0])
        name = row if names is None else int(names[row])
        raise ValueError(f"{what.format(name)} has no modality at all, expected at least one")


def place(cache: HiddenStateCache, device: torch.device) -> None:
    """Choose where the states live for a GPU that the cache does not serve yet, as `cache.to` does.

    A CPU is served from wherever they are.
    """
    if device.type != "cpu" and cache.device != device:
        cache.to(device)


def refuse_nonfinite(config: CrossanConfig, source: Source, name_of: Callable[[int], str]) -> None:
    """Raise for NaN or inf among what is read of dense states; what is absent may hold anything.

    On a GPU, and where `torch.compile` traces, the answer would have to be waited for: nothing is checked.

    Args:
        name_of: item n of the source in words.

    Raises:
        ValueError: naming the modality, the item and the level.
    """
    if source.states[0].device.type != "cpu" or torch.compiler.is_compiling():
        return
    for m, (name, states) in enumerate(zip(config.modality_names, source.states, strict=True)):
        if states.dtype not in FLOATS or not bool(nonfinite_rows(states.detach()).any()):
            continue
        rows = states.detach() if source.ids is None else states.detach()[source.ids]
        bad = nonfinite_rows(rows)
        if source.present is not None:
            bad &= source.present[:, m]
        if count := int(bad.sum()):
            first = int(bad.nonzero()[0])
            level = first_bad_level(rows[first])
            raise ValueError(
                f"states[{name!r}]: expected finite values, got NaN or inf in {count} "
                f"item{'s' if count > 1 else ''}, first {name_of(first)}, level {level}"
            )


def read_by_id(cache: HiddenStateCache, device: torch.device) -> bool:
    """Whether kernels on `device` reach the cache's rows; where not, rows are gathered for them first.

    The CPU reads memory and mapped files alike; a GPU reads a cache that is resident on it (see `place`).
    """
    return device.type == "cpu" or (cache.device == device and cache.tier == "resident")


def in_parts(
    cache: HiddenStateCache, device: torch.device, ids: Tensor, size: int
) -> Iterator[tuple[Tensor, Gathered | None]]:
    """`ids` in parts, with their rows read ahead where the op can't read them by id."""
    parts = ids.split(size)
    if read_by_id(cache, device):
        yield from ((part, None) for part in parts)
    else:
        ahead = cache.prefetch_stored(iter(parts), device)
        yield from ((part, rows) for part, (_, rows) in zip(parts, ahead, strict=True))


def read(config: CrossanConfig, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
    """A batch's distinct items, from the cache or as they were read ahead of it."""
    if ahead.gathered is None:
        place(cache, ids.device)
    return cached(config, cache, ids.device, ids, ahead.gathered)


def embed_in_chunks(
    embed: Callable[[Source], Tensor],
    config: CrossanConfig,
    cache: HiddenStateCache,
    catalogue: Source,
    size: int,
) -> Tensor:
    """`embed` of all items, a chunk's states at a time; the backward gathers them again."""
    assert catalogue.ids is not None
    device, chunks = catalogue.ids.device, []

    def of_chunk(ids: Tensor, present: Tensor | None) -> Tensor:
        return embed(replace(cached(config, cache, device, ids), present=present))

    for places in torch.arange(len(catalogue.ids), device=device).split(size):
        ids = catalogue.ids[places]
        present = None if catalogue.present is None else catalogue.present[places]
        chunks.append(checkpoint(of_chunk, ids, present, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(chunks)


def cached(
    config: CrossanConfig,
    cache: HiddenStateCache,
    device: torch.device,
    ids: Tensor | None = None,
    gathered: Gathered | None = None,
) -> Source:
    """The items `ids` of a cache; None: all, where they can be read by id.

    Args:
        gathered: their states `{name: [N, L, D_m]}`, or rows as they are stored, where they were read ahead.

    Raises:
        ValueError: a cache without the config's modalities; rows that are not those of `ids`.
    """
    order, mask = _order(config, cache), present_in(config, cache, device)
    present = mask if mask is None or ids is None else mask[ids]
    if gathered is None and read_by_id(cache, device):
        states, scales = cache.states(device, ids), cache.scales(device, ids)
        picked = None if scales is None else [scales[i] for i in order]
        return Source([states[i] for i in order], picked, ids, present, ids)
    if ids is None:
        raise ValueError(f"cache: expected states resident on {device}, got tier {cache.tier!r}")
    if gathered is None:
        gathered = cache.gather_stored(ids, device)
    elif not isinstance(gathered, Rows):
        gathered = Rows(dict(gathered))
    names = config.modality_names
    chosen = [gathered.states[name] for name in names]
    for name, rows in zip(names, chosen, strict=True):
        if rows.shape[0] != ids.shape[0]:
            raise ValueError(
                f"gathered[{name!r}]: expected a row for each of {len(ids)} ids, got {describe(rows)}"
            )
    picked = None if gathered.scales is None else [gathered.scales[name] for name in names]
    return Source(chosen, picked, None, present, ids)


def present_in(config: CrossanConfig, cache: HiddenStateCache, device: torch.device) -> Tensor | None:
    """Bool `[I + 1, M]` in the config's order of modalities; None: every item has every modality."""
    return cache.present_mask(device, _order(config, cache))


def bare_in(config: CrossanConfig, cache: HiddenStateCache, device: torch.device) -> Tensor | None:
    """Bool `[I + 1]`: items with none of the config's modalities; None: there are none such."""
    return cache.bare_mask(device, _order(config, cache))


def refuse_bare(config: CrossanConfig, cache: HiddenStateCache, ids: Tensor, what: str) -> None:
    """Raise for an id whose item has none of the config's modalities; waits for the device of `ids`.

    Raises:
        ValueError: naming the item.
    """
    if torch.compiler.is_compiling():
        return
    bare = bare_in(config, cache, ids.device)
    if bare is not None and bool(bare[ids].any()):
        row = int(ids[bare[ids]].flatten()[0])
        raise ValueError(
            f"{what}: item {cache.item_names[row]!r} (row {row}) has no modality at all, expected at least "
            f"one of {list(config.modality_names)}; read_interactions leaves out what it is told `bare`"
        )


def _said(frame: str) -> str:
    return f"states centred as {frame[:12]}" if frame else "states that are not centred"


def _order(config: CrossanConfig, cache: HiddenStateCache) -> list[int]:
    held = {modality.name: modality for modality in cache.modalities}
    for modality in config.modalities:
        other = held.get(modality.name)
        if other is None:
            hint = nearest(modality.name, held)
            raise ValueError(f"cache: holds {list(held)}, expected modality {modality.name!r}{hint}")
        if (other.width, other.levels) != (modality.width, modality.levels):
            raise ValueError(f"cache: expected {modality}, got {other}")
        if other.frame != modality.frame:
            raise ValueError(
                f"cache: modality {modality.name!r}: expected {_said(modality.frame)}, as the model was made "
                f"for, got {_said(other.frame)}; CrossanConfig(cache.modalities) makes one for this cache"
            )
    return [list(held).index(modality.name) for modality in config.modalities]
