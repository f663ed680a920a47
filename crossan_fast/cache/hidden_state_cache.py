"""Reading a cache: opened in milliseconds at any size, rows by id, resident where it fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossan_fast._checks import check_tensor, describe, nearest
from crossan_fast.cache.ahead import gather_ahead
from crossan_fast.cache.format import (
    NAMES,
    PRESENT,
    CorruptCacheError,
    dtype_name,
    is_quantized,
    read_meta,
    scales_file,
    states_file,
)
from crossan_fast.cache.staging import CudaTransport, StagingRing, read_rows
from crossan_fast.cache.tiers import (
    PageToucher,
    Placement,
    Tier,
    choose_tier,
    exact_device,
    free_memory,
    host_memory,
    map_file,
)
from crossan_fast.cache.validate import FLOATS, checked_present, checked_states, reject_nonfinite
from crossan_fast.cache.verify import verify_cache
from crossan_fast.config import Modality

_CHUNK_BYTES = 4 << 20
_NAMES_COMPARED = 50_000


class HiddenStateCache:
    """Pooled hidden states of frozen encoders, by item row: `c[m][i, l, :]` of the paper.

    Rows are 0..I; row 0 is the padding, all zeros. Made by `open` (a folder that `crossan-fast cache build`
    or `write_cache` wrote) or by `from_tensors` (states already in memory).

    A cache that was just opened is on tier `mmap`: its files are mapped, nothing is read. `to(device)` picks
    the fastest tier that fits and loads it. Not safe to call `to` or `states` from several threads at once;
    `gather` is.

    Attributes:
        modalities: name, width and levels of each, in the order of `present`'s columns.
        num_items: I.
        dtype: the storage dtype: float32, float16, bfloat16, float8_e4m3fn or int8 (float64 in memory only).
        present: bool `[I + 1, M]` on the CPU; row 0 is all False. States of absent modalities are zeros on
            disk.
        sources: by modality name, how its states were made (encoder, pooling, layers).
        folder: where it was opened, or None.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        states: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        present: Tensor,
        *,
        folder: Path | None = None,
        names: Sequence[str] | None = None,
        names_size: int = 0,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Not for users: `open` and `from_tensors` check what comes here."""
        self.modalities = tuple(modalities)
        self.num_items = len(present) - 1
        self.dtype = states[0].dtype
        self.present = present
        self.folder = folder
        self.sources = dict(sources or {})
        self._states = list(states)
        self._scales = list(scales) if scales is not None else None
        self._loaded: dict[torch.device, tuple[list[Tensor], list[Tensor] | None]] = {}
        self._masks: dict[tuple[torch.device, tuple[int, ...]], Tensor | None] = {}
        self._names_size = names_size
        if names is not None:
            self.item_names = ["", *names]
        if folder is not None:
            self._placement = Placement(
                torch.device("cpu"), "mmap", "opened; to(device) picks the fastest that fits"
            )
        else:
            self._placement = Placement(states[0].device, "resident", "made from tensors")
            self._loaded[states[0].device] = (self._states, self._scales)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = False) -> HiddenStateCache:
        """Map the cache in `folder`; reads meta.json alone, so it takes milliseconds at any size.

        Args:
            verify: read every byte and compare checksums first.

        Raises:
            FileNotFoundError: no such folder.
            IncompleteCacheError: a half-built cache; the message says how to go on.
            CorruptCacheError: a file is missing or short, or, with `verify`, bytes differ from what was
                written.
            CacheError: the folder is no cache, or one of another version.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        if verify and (problems := verify_cache(folder)):
            raise CorruptCacheError(f"folder: {folder} is damaged: " + "; ".join(problems))
        rows = meta.num_items + 1

        def mapped(name: str) -> Tensor:
            return map_file(folder / name, meta.committed(name))

        scales = None
        if is_quantized(meta.dtype):
            scales = [
                mapped(scales_file(m)).view(torch.float32).view(rows, m.levels) for m in meta.modalities
            ]
        return cls(
            meta.modalities,
            [mapped(states_file(m)).view(meta.dtype).view(rows, m.levels, m.width) for m in meta.modalities],
            scales,
            mapped(PRESENT).view(torch.bool).view(rows, len(meta.modalities)),
            folder=folder,
            names_size=meta.committed(NAMES),
            sources=meta.sources,
        )

    @classmethod
    def from_tensors(
        cls,
        states: Mapping[str, Tensor],
        present: Tensor | None = None,
        item_names: Sequence[str] | None = None,
        *,
        scales: Mapping[str, Tensor] | None = None,
    ) -> HiddenStateCache:
        """A cache of tensors in memory, which are used as they are, not copied.

        Args:
            states: `{name: [I + 1, L, D_m]}`, one dtype, one device; row 0 is the padding, all zeros.
            present: bool `[I + 1, M]`; default: every item has every modality.
            item_names: names of rows 1..I (or of 0..I, the first ''); default '1', '2', ….
            scales: `{name: fp32 [I + 1, L]}` for int8 and fp8 states, and for those alone.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or names do not fit, row 0 is not zero, or there
                is a NaN or inf (the item is named).
        """
        modalities, names = checked_states(states, item_names)
        first = states[modalities[0].name]
        allowed = (*FLOATS, torch.int8, torch.float8_e4m3fn)
        for name, tensor in states.items():
            check_tensor(f"states[{name!r}]", tensor, tensor.shape, dtypes=allowed, device=first.device)
            if tensor.dtype != first.dtype:
                raise TypeError(
                    f"states[{name!r}]: expected {first.dtype} like the first, got {describe(tensor)}"
                )
            reject_nonfinite(tensor, name, names)
        if is_quantized(first.dtype) != (scales is not None):
            raise ValueError(
                f"scales: int8 and fp8 states need them and no others, got states of {first.dtype}"
            )
        ordered = None
        if scales is not None:
            _known_names("scales", scales, modalities)
            ordered = []
            for m in modalities:
                shape = (len(names) + 1, m.levels)
                name = f"scales[{m.name!r}]"
                ordered.append(
                    check_tensor(name, scales[m.name], shape, dtypes=(torch.float32,), device=first.device)
                )
                reject_nonfinite(scales[m.name], m.name, names)
        flags = checked_present(present, modalities, len(names))
        return cls(modalities, list(states.values()), ordered, flags, names=names)

    # Items

    @cached_property
    def item_names(self) -> Sequence[str]:
        """Row -> item name, '' for row 0; read on first use."""
        assert self.folder is not None
        with open(self.folder / NAMES, "rb") as file:
            names = ["", *file.read(self._names_size).decode().split("\n")[:-1]]
        if len(names) != self.num_items + 1:
            raise CorruptCacheError(
                f"{self.folder / NAMES}: expected {self.num_items} lines, got {len(names) - 1}"
            )
        return names

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.item_names) if row}

    def row_of(self, name: str) -> int:
        """The row of an item. Raises KeyError, with the nearest known name, for an unknown one."""
        row = self._rows.get(name)
        if row is None:
            # Comparing a name with millions takes minutes; those with the same beginning are the likely ones.
            known: Iterable[str] = self._rows
            if self.num_items > _NAMES_COMPARED:
                known = (other for other in self._rows if other[:3] == str(name)[:3])
            raise KeyError(
                f"name: no item {name!r} among the cache's {self.num_items}{nearest(str(name), known)}"
            )
        return row

    def rows_of(self, names: Sequence[str]) -> Tensor:
        """Rows int64 `[n]` of item names; an unknown one raises as in `row_of`."""
        return torch.tensor([self.row_of(name) for name in names], dtype=torch.int64)

    # Placement

    @property
    def nbytes(self) -> int:
        """Bytes of all states and scales in the storage dtype."""
        return sum(t.numel() * t.element_size() for t in (*self._states, *(self._scales or ())))

    @property
    def device(self) -> torch.device:
        """What `to` chose last, the default of `gather`; the CPU at first."""
        return self._placement.device

    @property
    def tier(self) -> Tier:
        """`resident` (on `device`), `pinned` (page-locked host memory) or `mmap` (files, read row by row)."""
        return self._placement.tier

    @property
    def tier_reason(self) -> str:
        """Why this tier: sizes in words, or 'asked for'."""
        return self._placement.reason

    def placement(self, device: str | torch.device, tier: Tier | str = "auto") -> Placement:
        """The tier that `to(device, tier)` would choose now, and why; nothing is loaded."""
        target = exact_device(device)
        return choose_tier(
            self.nbytes,
            target,
            device_free=free_memory(target),
            host_free=host_memory(),
            asked=tier,
            on_disk=self.folder is not None,
        )

    def to(self, device: str | torch.device, tier: Tier | str = "auto") -> HiddenStateCache:
        """Choose where the states live from now on, load them there, and return self.

        Args:
            device: that `gather` returns to by default.
            tier: `auto` (by size, see `crossan_fast.cache.tiers.choose_tier`), `resident`, `pinned` or
                `mmap`.

        Raises:
            ValueError: the tier cannot serve this device or this cache, or loading met a NaN or inf.
            RuntimeError: the device is not there.
        """
        self._placement = self.placement(device, tier)
        target = self.device
        if self.tier == "resident":
            self._load(target, target)
        elif self.tier == "pinned":
            self._load(target, torch.device("cpu"), pin=True)
        else:
            self._loaded.pop(target, None)
        return self

    def states(self, device: str | torch.device) -> list[Tensor]:
        """`[I + 1, L, D_m]` on `device` in the storage dtype, one for each modality in order; read only.

        For kernels that gather inside. A GPU that `to` was not called for yet is chosen as by `to`. Loaded
        once and kept. On the CPU these are the memory-mapped files unless `to("cpu")` chose `resident`, so
        that a kernel reads from disk no more than the rows it touches.

        Raises:
            RuntimeError: the states are too large for this GPU; `gather` and `prefetch` serve it instead.
        """
        return self._at(exact_device(device))[0]

    def scales(self, device: str | torch.device) -> list[Tensor] | None:
        """fp32 `[I + 1, L]` for each modality of an int8 or fp8 cache, placed as `states`; else None."""
        return self._at(exact_device(device))[1]

    def present_mask(
        self, device: str | torch.device, modalities: Sequence[int] | None = None
    ) -> Tensor | None:
        """Columns `modalities` (default: all) of `present` on `device`, made once and kept.

        None where every item has all of them.

        Raises:
            ValueError: an item that has none of them, by name.
        """
        chosen = tuple(range(len(self.modalities)) if modalities is None else modalities)
        key = (exact_device(device), chosen)
        if key not in self._masks:
            rows = self.present[:, list(chosen)]
            empty = ~rows[1:].any(dim=1)
            if bool(empty.any()):
                row = int(empty.nonzero()[0]) + 1
                names = [self.modalities[m].name for m in chosen]
                raise ValueError(
                    f"cache: item {self.item_names[row]!r} (row {row}) has no modality at all, expected at "
                    f"least one of {names}"
                )
            self._masks[key] = None if bool(rows[1:].all()) else rows.to(key[0])
        return self._masks[key]

    def _at(self, device: torch.device) -> tuple[list[Tensor], list[Tensor] | None]:
        if device not in self._loaded:
            if device.type == "cpu" and self.folder is not None:
                return self._states, self._scales
            self.to(device)
        loaded = self._loaded.get(device)
        if loaded is None or loaded[0][0].device != device:
            raise RuntimeError(
                f"device: the states are not resident on {device} but {self.tier} ({self.tier_reason}); use "
                "gather or prefetch, or to(device, tier='resident')"
            )
        return loaded

    def _load(self, key: torch.device, where: torch.device, pin: bool = False) -> None:
        if key in self._loaded and self._loaded[key][0][0].device == where:
            return

        def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [
                self._copied(t, where, pin, m.name) for t, m in zip(tensors, self.modalities, strict=True)
            ]

        self._loaded[key] = copies(self._states), None if self._scales is None else copies(self._scales)

    def _copied(self, source: Tensor, where: torch.device, pin: bool, name: str) -> Tensor:
        """A copy made a chunk at a time: a mapped file is read once, in order, and checked on the way."""
        copy = torch.empty(source.shape, dtype=source.dtype, device=where, pin_memory=pin)
        step = max(1, _CHUNK_BYTES // max(1, source[0].numel() * source.element_size()))
        for start in range(0, len(source), step):
            chunk = source[start : start + step]
            if self.folder is not None:
                reject_nonfinite(chunk, name, _Lazy(self), start)
            copy[start : start + step].copy_(chunk)
        return copy

    # Rows

    def gather(
        self, ids: Tensor, device: str | torch.device | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """States of the items `ids`, `{name: [n, L, D_m]}`.

        Args:
            ids: int64 or int32 `[n]`, rows in 0..I, any order, repeats allowed; on any device.
            device: of the result; default: what `to` chose last.
            dtype: of the result; default: the storage dtype, fp32 for int8 and fp8.

        Raises:
            TypeError: ids of another dtype. ValueError: ids of another shape. IndexError: ids out of range.
        """
        checked = self._checked_ids(ids)
        target = self.device if device is None else exact_device(device)
        return self._gather(checked, target, dtype)

    def prefetch(
        self,
        batches: Iterable[Tensor],
        device: str | torch.device | None = None,
        *,
        depth: int = 2,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """`(ids, gather(ids))` of each batch in order, the next `depth` being read by a background thread
        meanwhile.

        For tiers `pinned` and `mmap`; a resident cache is gathered from at once. Rows for a GPU go through a
        ring of page-locked buffers and a stream of their own (`crossan_fast.cache.staging`); the yielded
        tensors are ready on the current stream. An error of a batch is raised where that batch would have
        been yielded.
        """
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        target = self.device if device is None else exact_device(device)
        if target in self._loaded and self._loaded[target][0][0].device == target:
            for ids in batches:
                yield ids, self._gather(self._checked_ids(ids), target, dtype)
            return
        checked = (self._checked_ids(ids).cpu() for ids in batches)
        ring = StagingRing(CudaTransport(target)) if target.type == "cuda" else None
        yield from gather_ahead(checked, lambda ids: self._gather(ids, target, dtype, ring), target, depth)

    def touch(self, ids: Tensor) -> None:
        """Start reading the files' pages of rows `ids` `[n]` in the background, and return at once.

        For kernels that gather from `states("cpu")` on tier `mmap`: say the next batch's ids before computing
        this one's, and its rows are in memory when their turn comes. Does nothing on other tiers, nor while
        the two calls before this one are still being served.
        """
        ids = self._checked_ids(ids).cpu()
        if self.folder is None or torch.device("cpu") in self._loaded:
            return
        self._toucher.submit(ids)

    @cached_property
    def _toucher(self) -> PageToucher:
        return PageToucher([*self._states, *(self._scales or ())])

    def _gather(
        self, ids: Tensor, target: torch.device, dtype: torch.dtype | None, ring: StagingRing | None = None
    ) -> dict[str, Tensor]:
        states, scales = self._loaded.get(target, (self._states, self._scales))
        rows = read_rows(states, scales, ids, target, dtype, ring)
        return {modality.name: tensor for modality, tensor in zip(self.modalities, rows, strict=True)}

    def _checked_ids(self, ids: Tensor) -> Tensor:
        check_tensor("ids", ids, ("n",), dtypes=(torch.int64, torch.int32))
        if ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high > self.num_items:
                wrong = low if low < 0 else high
                raise IndexError(f"ids: expected rows 0 to {self.num_items}, got {wrong}")
        return ids

    def __repr__(self) -> str:
        parts = ", ".join(f"{m.name} {m.levels}×{m.width}" for m in self.modalities)
        kind = dtype_name(self.dtype) if self.dtype != torch.float64 else "fp64"
        return f"HiddenStateCache({self.num_items} items, {parts}, {kind}, {self.tier} on {self.device})"


class _Lazy(Sequence[str]):
    """Names of rows 1..I, read from the folder only if an error has to name an item."""

    def __init__(self, cache: HiddenStateCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return self._cache.num_items

    def __getitem__(self, index: Any) -> Any:
        return self._cache.item_names[index + 1]


def _known_names(what: str, given: Iterable[str], modalities: Sequence[Modality]) -> None:
    known = [m.name for m in modalities]
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: unknown modality {name!r}, expected {known}{nearest(name, known)}")
    if missing := [name for name in known if name not in given]:
        raise ValueError(f"{what}: expected all of {known}, got none for {missing}")
