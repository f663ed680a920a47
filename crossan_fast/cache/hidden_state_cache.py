"""Reading a cache: opened in milliseconds at any size, rows by id, resident where it fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossan_fast.cache.ahead import gather_ahead
from crossan_fast.cache.checked import CheckedRows
from crossan_fast.cache.folders import at_one_moment
from crossan_fast.cache.format import CacheMeta, dtype_name
from crossan_fast.cache.frame import framed
from crossan_fast.cache.loading import load
from crossan_fast.cache.masks import masks_of
from crossan_fast.cache.names import ItemNames
from crossan_fast.cache.opening import Mapped, Verify, checked_verify, map_folder
from crossan_fast.cache.pages import PageReader
from crossan_fast.cache.staging import CudaTransport, Rows, StagingRing, read_rows, read_stored
from crossan_fast.cache.tiers import (
    Placement,
    Tier,
    choose_tier,
    exact_device,
    free_memory,
    host_memory,
)
from crossan_fast.cache.validate import check_ids, checked_present, checked_states, checked_stored
from crossan_fast.config import Modality
from crossan_fast.data.catalogue import Catalogue

_OPENED = "opened; to(device) picks the fastest that fits"


class HiddenStateCache:
    """Pooled hidden states of frozen encoders, by item row: `c[m][i, l, :]` of the paper.

    Rows are 0..I; row 0 is the padding, all zeros. Made by `open` (a folder that `crossan-fast cache build`
    or `write_cache` wrote) or by `from_tensors` (states already in memory).

    A cache that was just opened is on tier `mmap`: its files are mapped, nothing is read. `to(device)` picks
    the fastest tier that fits and loads it. Not safe to call `to` or `states` from several threads at once;
    `gather` is. Files that get shorter while they are mapped are refused by name, by sizes that are compared
    before rows are read; one that is cut in the very moment of a read ends the process (SIGBUS), as it would
    any program that maps files. This package replaces files, it never cuts them.

    Attributes:
        modalities: name, width and levels of each, in the order of `present`'s columns.
        num_items: I.
        catalogue: what the rows mean.
        dtype: the storage dtype: float32, float16, bfloat16, float8_e4m3fn or int8 (float64 in memory only).
        present: bool `[I + 1, M]` on the CPU; row 0 is all False. Absent modalities' states are zeros.
        sources: by modality name, how its states were made (encoder, pooling, layers).
        frames: by name, of modalities not kept as their encoder gave them; `project` brings states there.
        bases: of these, the bases fp32 `[k, D]` of those kept as coordinates in one, D the encoder's width.
        folder: where it was opened, or None.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        states: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        present: Tensor,
        *,
        names: Sequence[str],
        mapped: Mapped | None = None,
        folder: Path | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Not for users: `open` and `from_tensors` check what comes here."""
        self.modalities = tuple(modalities)
        self.num_items = len(present) - 1
        self.dtype = states[0].dtype
        self.present = present
        self.folder = folder
        self.sources, self.frames = dict(sources or {}), dict(mapped.frames if mapped else {})
        self.bases = {name: f.basis for name, f in self.frames.items() if f.basis is not None}
        self._states = list(states)
        self._scales = list(scales) if scales is not None else None
        self._loaded: dict[torch.device, tuple[list[Tensor], list[Tensor] | None]] = {}
        self._masks: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor | None, Tensor | None]] = {}
        self._names = names if isinstance(names, ItemNames) else ItemNames(self.num_items, names)
        self.catalogue = Catalogue.of(self._names)
        files, segments = (mapped.files, mapped.segments) if mapped else ((), ())
        self._checked = CheckedRows(self.modalities, states, scales, self._names, folder, files, segments)
        self._reader: PageReader | None = None
        if mapped is not None:
            self._reader = PageReader(files, len(present), self._checked)
            self._placement = Placement(torch.device("cpu"), "mmap", _OPENED)
        else:
            self._checked.finish()
            self._placement = Placement(states[0].device, "resident", "made from tensors")
            self._loaded[states[0].device] = (self._states, self._scales)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: Verify | bool = "lazy") -> HiddenStateCache:
        """Map the cache in `folder`; reads its small files alone, so it takes milliseconds at any size.

        Args:
            verify: when bytes are compared with their checksums: small files now and a row's segment (1 to 64
                MiB) before its first use (`lazy`), everything now (`open`, or True), or nothing but frames
                ever (`off`, or False). Files that do not fit the memory are read once more by `lazy`.

        Raises:
            FileNotFoundError: no such folder.
            IncompleteCacheError: a half-built cache; the message says how to go on.
            CorruptCacheError: a file is missing or short, or its bytes are not those written.
            CacheError: the folder is no cache, or one of another version.
        """
        folder, when = Path(folder), checked_verify(verify)
        return at_one_moment(folder, lambda meta: cls._mapped(folder, meta, when))

    @classmethod
    def _mapped(cls, folder: Path, meta: CacheMeta, verify: Verify) -> HiddenStateCache:
        found = map_folder(folder, meta, verify)
        return cls(
            framed(meta.modalities, found.frames),
            found.states,
            found.scales,
            found.present,
            names=found.names,
            mapped=found,
            folder=folder,
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
        ordered = checked_stored(states, scales, modalities, names)
        flags = checked_present(present, modalities, len(names))
        return cls(modalities, list(states.values()), ordered, flags, names=names)

    # Items

    @property
    def item_names(self) -> Sequence[str]:
        """Row -> item name, '' for row 0; read on first use."""
        return self._names.by_row

    def row_of(self, name: str) -> int:
        """The row of an item. Raises KeyError, with the nearest known name, for an unknown one."""
        return self._names.row_of(name)

    def rows_of(self, names: Sequence[str]) -> Tensor:
        """Rows int64 `[n]` of item names; an unknown one raises as in `row_of`, one string a TypeError."""
        return torch.tensor(self._names.rows_of(names), dtype=torch.int64)

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
            tier: `auto` (by size, see `cache.tiers.choose_tier`), `resident`, `pinned` or `mmap`.

        Raises:
            ValueError: the tier cannot serve this device or this cache, or loading met a NaN or inf.
            RuntimeError: the device is not there.
        """
        self._placement = self.placement(device, tier)
        target, pin = self.device, self.tier == "pinned"
        if self.tier == "mmap":
            self._loaded.pop(target, None)
        else:
            self._load(target, torch.device("cpu") if pin else target, pin)
        return self

    def states(self, device: str | torch.device, ids: Tensor | None = None) -> list[Tensor]:
        """`[I + 1, L, D_m]` on `device` in the storage dtype, one for each modality in order; read only.

        For kernels that gather inside. A GPU that `to` was not called for yet is chosen as by `to`. On the
        CPU these are the memory-mapped files unless `to("cpu")` chose `resident`: only touched rows are read.

        Args:
            ids: the only rows that will be read, int64 or int32 `[n]`; None: any. Rows of mapped files are
                checked before their first use: None reads the files whole once. `torch.compile` traces no
                check: call `warm(wait=True)` before.

        Raises:
            RuntimeError: the states are too large for this GPU; `gather` and `prefetch` serve it instead.
            ValueError, IndexError: on the CPU alone, NaN or inf in a row, or it is not what was written; ids
                out of range.
        """
        return self._finite_at(device, ids)[0]

    def scales(self, device: str | torch.device, ids: Tensor | None = None) -> list[Tensor] | None:
        """fp32 `[I + 1, L]` for each modality of an int8 or fp8 cache, placed as `states`; else None."""
        return self._finite_at(device, ids)[1]

    def present_mask(
        self, device: str | torch.device, modalities: Sequence[int] | None = None
    ) -> Tensor | None:
        """Columns `modalities` (default: all) of `present` on `device`, made once and kept.

        None where every item has all of them.
        """
        return self._looked_at(device, modalities)[0]

    def bare_mask(self, device: str | torch.device, modalities: Sequence[int] | None = None) -> Tensor | None:
        """Bool `[I + 1]` on `device`: items with none of `modalities` (default: all), which nothing embeds.

        None where every item has at least one; row 0 is False.
        """
        return self._looked_at(device, modalities)[1]

    def _looked_at(
        self, device: str | torch.device, modalities: Sequence[int] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        chosen = tuple(range(len(self.modalities)) if modalities is None else modalities)
        key = (exact_device(device), chosen)
        if key not in self._masks:
            self._masks[key] = masks_of(self.present, *key)
        return self._masks[key]

    def _finite_at(
        self, device: str | torch.device, ids: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        found = self._at(exact_device(device))
        # A GPU would have to be waited for at every step; what was made of tensors has been looked at.
        on_host = found[0] is self._states and found[0][0].device.type == "cpu"
        if on_host and not torch.compiler.is_compiling():
            self._checked.look(ids if ids is None else check_ids(ids, self.num_items))
        return found

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
        copies = load([*self._states, *(self._scales or ())], self._checked, where, pin)
        split = len(self._states)
        self._loaded[key] = copies[:split], copies[split:] or None

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
            TypeError: ids of another dtype. IndexError: ids out of range. ValueError: ids of another shape;
                NaN or inf in a row, or it is not what was written.
        """
        return self._gather(check_ids(ids, self.num_items), self._target(device), dtype).states

    def gather_stored(self, ids: Tensor, device: str | torch.device | None = None) -> Rows:
        """As `gather`, as they are stored: int8 and fp8 rows with their scales, for an op to convert."""
        return self._gather(check_ids(ids, self.num_items), self._target(device), stored=True)

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
        for ids, rows in self._prefetch(batches, self._target(device), depth, dtype):
            yield ids, rows.states

    def prefetch_stored(
        self, batches: Iterable[Tensor], device: str | torch.device | None = None, *, depth: int = 2
    ) -> Iterator[tuple[Tensor, Rows]]:
        """`prefetch` of `gather_stored`: what crosses to a GPU, and stays there, is what is stored."""
        yield from self._prefetch(batches, self._target(device), depth, stored=True)

    def _prefetch(
        self,
        batches: Iterable[Tensor],
        target: torch.device,
        depth: int,
        dtype: torch.dtype | None = None,
        stored: bool = False,
    ) -> Iterator[tuple[Tensor, Rows]]:
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        checked = (check_ids(ids, self.num_items) for ids in batches)
        if target in self._loaded and self._loaded[target][0][0].device == target:
            for ids in checked:
                yield ids, self._gather(ids, target, dtype, stored)
            return
        ring = StagingRing(CudaTransport(target)) if target.type == "cuda" else None
        pages = None if target in self._loaded else self._pages

        def gather(ids: Tensor) -> Rows:
            if pages is not None:
                pages.request(ids)
            return self._gather(ids, target, dtype, stored, ring)

        yield from gather_ahead((ids.cpu() for ids in checked), gather, target, depth)

    def touch(self, ids: Tensor) -> None:
        """Start reading the files' pages of rows `ids` `[n]` in the background, and return at once.

        For kernels that gather from `states("cpu")` on tier `mmap`: say the next batch's ids before computing
        this one's, and its rows are in memory when their turn comes. Does nothing on other tiers, nor while
        the two calls before this one are still being served.
        """
        ids = check_ids(ids, self.num_items).cpu()
        if self._pages is not None:
            self._pages.read(ids)

    def warm(self, *, wait: bool = False) -> bool:
        """Start reading the files whole in the background where they fit the free memory.

        For tier `mmap`, before an epoch: in order a disk reads many times as fast as row by row, and
        gathering then meets no page that is not in memory. The system may take pages back: call it before
        each epoch; what is still in memory is gone through at memory speed. Rows are checked on the way.

        Args:
            wait: return when all is read; raises for NaN or inf, and for what is not what was written, as
                else a row's first use does. Either way the masks of all modalities are made on `device`.

        Returns:
            Whether they are, or will be, in memory.

        Raises:
            CorruptCacheError: a file is shorter than when it was opened.
        """
        self._looked_at(self.device, None)  # for `torch.compile`, which cannot make them
        if self._pages is None:
            return True
        self._pages.require_whole()
        fits = self._pages.read_all()
        if wait:
            self._pages.wait()
        return fits

    @property
    def _pages(self) -> PageReader | None:
        """None where the CPU has a copy in memory, or never had files."""
        return None if torch.device("cpu") in self._loaded else self._reader

    def __getstate__(self) -> dict[str, Any]:
        # The states of a copy by copy.deepcopy or pickle are in memory: no files to read ahead.
        return {**self.__dict__, "_reader": None}

    def _gather(
        self,
        ids: Tensor,
        target: torch.device,
        dtype: torch.dtype | None = None,
        stored: bool = False,
        ring: StagingRing | None = None,
    ) -> Rows:
        states, scales = self._loaded.get(target, (self._states, self._scales))
        if states is self._states:
            self._checked.look(ids)
        names = [modality.name for modality in self.modalities]
        if not stored or scales is None:
            return Rows(dict(zip(names, read_rows(states, scales, ids, target, dtype, ring), strict=True)))
        rows, factors = read_stored(states, scales, ids, target, ring)
        by_name = None if factors is None else dict(zip(names, factors, strict=True))
        return Rows(dict(zip(names, rows, strict=True)), by_name)

    def _target(self, device: str | torch.device | None) -> torch.device:
        return self.device if device is None else exact_device(device)

    def __repr__(self) -> str:
        of = {name: str(frame) for name, frame in self.frames.items()}
        parts = ", ".join(f"{m.name} {m.levels}×{m.width}{of.get(m.name, '')}" for m in self.modalities)
        kind = dtype_name(self.dtype) if self.dtype != torch.float64 else "fp64"
        return f"HiddenStateCache({self.num_items} items, {parts}, {kind}, {self.tier} on {self.device})"
