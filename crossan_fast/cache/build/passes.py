"""One pass over the items: an encoder, or an array of states, that serves one or more modalities at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast.cache.basis import ENERGY
from crossan_fast.cache.build import digests
from crossan_fast.cache.build.features import Array, match, open_features
from crossan_fast.cache.build.inputs import BrokenInput
from crossan_fast.cache.build.specs import DEFAULT_COLUMNS, ModalitySpec
from crossan_fast.cache.format import CacheError
from crossan_fast.cache.frame import Frame
from crossan_fast.cache.levels import choose_levels, pool
from crossan_fast.config import Modality

if TYPE_CHECKING:
    from crossan_fast.cache.build.encoders import FrozenEncoder

DEFAULT_LEVELS, MAX_LENGTH = 7, 30


class Items(Protocol):
    """What a build reads of an items file; `crossan_fast.data.items.ItemTable` is one.

    `names[i]` has `columns[c][i]`, None where the cell is empty; relative paths in cells start from `folder`.
    """

    names: list[str]
    columns: dict[str, list[str | None]]
    folder: Path


class Pass(Protocol):
    """Runs once over the items and yields states of each of its modalities."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """In the order of what `encode` returns."""

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """By modality name, how its states are made: JSON values that go to meta.json."""

    @property
    def fingerprint(self) -> str:
        """Of the weights, '' where there are none or they are not loaded yet."""

    @property
    def threads(self) -> int:
        """How many threads may call `read` at once."""

    @property
    def mixes_sizes(self) -> bool:
        """Whether inputs of different `sizes` may share a batch."""

    def missing(self, index: int) -> str | None:
        """Why item `index` of the items file has no input at all, or None."""

    def record(self, index: int, before: bytes) -> bytes:
        """What item `index` of the items file has as input, as `crossan_fast.cache.build.digests` puts it.

        `before` is the record that its row was made from.
        """

    def sizes(self, indices: Sequence[int]) -> list[int]:
        """What batches are sorted by."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Get ready to encode."""

    def unload(self) -> None:
        """Let go of what `load` took."""

    def read(self, index: int) -> Tensor:
        """The input of an item. Raises `BrokenInput`."""

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """fp32 `[B, L, D]` on the CPU for each modality."""


class EncoderPass:
    """All modalities of one encoder and column: pooled or levelled differently, encoded once."""

    def __init__(self, encoder: FrozenEncoder, specs: Sequence[ModalitySpec], items: Items) -> None:
        self.encoder = encoder
        self.threads, self.mixes_sizes = encoder.threads, encoder.mixes_sizes
        self._specs = tuple(specs)
        self._folder = Path(items.folder)
        column = specs[0].column or DEFAULT_COLUMNS[encoder.kind]
        if column not in items.columns:
            raise ValueError(
                f"modality {specs[0].name!r}: column: expected one of {sorted(items.columns)}, got {column!r}"
                f"{nearest(column, items.columns)} (:column=NAME behind its source names another)"
            )
        self._cells = items.columns[column]
        self.column = column
        for spec in specs:
            encoder.check_pooling(spec.pool)
        self._layers = [self._chosen(spec) for spec in specs]
        self.modalities = tuple(
            Modality(spec.name, encoder.width, len(layers))
            for spec, layers in zip(specs, self._layers, strict=True)
        )
        self.records = {
            spec.name: self._record(spec, layers) for spec, layers in zip(specs, self._layers, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    def missing(self, index: int) -> str | None:
        """Why this item has no input at all, or None."""
        return None if self._cells[index] else f"empty {self.column}"

    def record(self, index: int, before: bytes) -> bytes:
        cell = self._cell(index)
        if self.missing(index) is not None:
            return digests.EMPTY
        if isinstance(cell, str):
            return digests.of_bytes("text", cell.encode("utf-8", "surrogatepass"))
        return digests.of_file(cell, before)

    def sizes(self, indices: Sequence[int]) -> list[int]:
        return self.encoder.sizes([self._cell(index) for index in indices])

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder.load(device, dtype)

    def unload(self) -> None:
        self.encoder.unload()

    def read(self, index: int) -> Tensor:
        return self.encoder.read(self._cell(index))

    @torch.inference_mode()
    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """fp32 `[B, L, D]` on the CPU for each modality."""
        hidden, mask = self.encoder.states(inputs)
        result = []
        for spec, layers in zip(self._specs, self._layers, strict=True):
            pooled = [pool(hidden[layer], mask, spec.pool) for layer in layers]
            result.append(torch.stack(pooled, dim=1).cpu())
        return result

    def _cell(self, index: int) -> str | Path:
        cell = self._cells[index] or ""
        return cell if self.encoder.kind == "text" else self._folder / cell

    def _chosen(self, spec: ModalitySpec) -> tuple[int, ...]:
        try:
            return choose_levels(DEFAULT_LEVELS if spec.levels is None else spec.levels, self.encoder.layers)
        except ValueError as error:
            raise ValueError(f"modality {spec.name!r}: {error}; say which with levels=...") from error

    def _record(self, spec: ModalitySpec, layers: tuple[int, ...]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "encoder": self.encoder.source,
            "model_type": self.encoder.model_type,
            "kind": self.encoder.kind,
            "column": self.column,
            "encoder_layers": self.encoder.layers,
            "layers": list(layers),
            "pool": spec.pool,
        }
        if self.encoder.kind == "text":
            record |= {"max_length": self.encoder.max_length, "lowercase": self.encoder.lowercase}
        return record


class ArrayPass:
    """A modality whose states were computed elsewhere: see `crossan_fast.cache.build.features`."""

    threads, mixes_sizes, fingerprint = 1, True, ""

    def __init__(self, spec: ModalitySpec, items: Items) -> None:
        where = f"modality {spec.name!r}: source"
        ids = None if spec.ids is None else Path(spec.ids)
        self._features = open_features(Path(spec.source), ids, where)
        self._rows = match(self._features, items.names, where).rows
        count, width = self._features.shape
        self._levels = list(choose_levels(spec.levels if spec.levels is not None else count, count - 1))
        self.modalities = (Modality(spec.name, width, len(self._levels)),)
        path = str(Path(spec.source).resolve())
        self.records = {spec.name: {"precomputed": path, "layers": self._levels}}

    def missing(self, index: int) -> str | None:
        return None if self._rows[index] >= 0 else f"no row in {self._features.source.name}"

    def record(self, index: int, before: bytes) -> bytes:
        if self.missing(index) is not None:
            return digests.EMPTY
        try:
            return digests.of_bytes("states", self._states(index).tobytes())
        except BrokenInput:
            return digests.UNREADABLE

    def _states(self, index: int) -> Array:
        return self._features.read(int(self._rows[index]))[self._levels]

    def sizes(self, indices: Sequence[int]) -> list[int]:
        return [0] * len(indices)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load: the array is mapped."""

    def unload(self) -> None:
        """Nothing to let go of."""

    def read(self, index: int) -> Tensor:
        states = torch.from_numpy(np.array(self._states(index), dtype=np.float32))
        if not states.isfinite().all():
            raise BrokenInput("NaN or inf in the precomputed states")
        return states

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(inputs))]


class FramedPass:
    """A pass whose states are appended to a cache in its frames: centred, as coordinates in its bases.

    Args:
        inner: yields states as wide as the encoder's, or the array's.
        frames: by the names of modalities that are stored in one.
        sources: of the cache.

    Raises:
        CacheError: states of another shape than a frame is for.
    """

    def __init__(
        self, inner: Pass, frames: Mapping[str, Frame], sources: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._inner, self._frames = inner, [frames.get(m.name, Frame()) for m in inner.modalities]
        widths = []
        for modality, frame in zip(inner.modalities, self._frames, strict=True):
            kept = modality.width if frame.basis is None else len(frame.basis)
            if frame.width not in (None, modality.width):
                what = "centred" if frame.basis is None else f"{kept} coordinates of"
                raise CacheError(
                    f"modality {modality.name!r}: the cache keeps {what} states of width {frame.width}, got "
                    f"states of width {modality.width}"
                )
            widths.append(kept)
        self.modalities = tuple(
            replace(modality, width=width) for modality, width in zip(inner.modalities, widths, strict=True)
        )
        # What the basis was measured to hold when it was chosen.
        self.records = {
            name: {**record, ENERGY: sources[name][ENERGY]} if ENERGY in sources.get(name, {}) else record
            for name, record in inner.records.items()
        }
        self.threads, self.mixes_sizes = inner.threads, inner.mixes_sizes
        self.missing, self.record, self.sizes = inner.missing, inner.record, inner.sizes
        self.load, self.unload, self.read = inner.load, inner.unload, inner.read

    @property
    def fingerprint(self) -> str:
        return self._inner.fingerprint

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        found = zip(self._inner.encode(inputs), self._frames, strict=True)
        return [frame.project(states) if frame else states for states, frame in found]


def plan_passes(specs: Sequence[ModalitySpec], items: Items) -> list[Pass]:
    """Passes that serve all `specs`: those that read the same column with the same encoder share one."""
    groups: dict[tuple[object, ...], list[ModalitySpec]] = {}
    passes: list[Pass] = []
    for spec in specs:
        if spec.precomputed:
            passes.append(ArrayPass(spec, items))
            continue
        key = (spec.source, spec.kind, spec.column, spec.max_length, spec.lowercase)
        groups.setdefault(key, []).append(spec)
    if groups:
        # Here, because reading a cache and precomputed states need no transformers.
        from crossan_fast.cache.build.encoders import FrozenEncoder

    for group in groups.values():
        first = group[0]
        encoder = FrozenEncoder(
            first.source,
            kind=first.kind,
            max_length=MAX_LENGTH if first.max_length is None else first.max_length,
            lowercase=bool(first.lowercase),
        )
        passes.append(EncoderPass(encoder, group, items))
    return passes
