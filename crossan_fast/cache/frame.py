"""What a cache's numbers mean: an encoder's states, centred, or as coordinates in a basis, or both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from crossan_fast._checks import describe
from crossan_fast.cache import basis as bases
from crossan_fast.cache.centring import Centring
from crossan_fast.config import Modality


@dataclass(frozen=True, eq=False)
class Frame:
    """How a modality's states are kept: centred first, then as coordinates.

    Attributes:
        centring: None: not centred.
        basis: orthonormal rows, fp32 `[k, D]`; None: all D dimensions.
    """

    centring: Centring | None = None
    basis: Tensor | None = None

    def project(self, states: Tensor) -> Tensor:
        """fp32 `[..., L, k]`: what the cache keeps of an encoder's states `[..., L, D]`.

        An item without the modality, and the padding, are zeros in a cache, whatever this says of zeros.

        Raises:
            ValueError: states of another shape.
        """
        shape = (None if self.centring is None else len(self.centring.scale), self.width)
        if states.ndim < 2 or any(
            expected not in (None, got) for expected, got in zip(shape, states.shape[-2:], strict=True)
        ):
            levels, width = ("?" if size is None else size for size in shape)
            raise ValueError(f"states: expected [..., {levels}, {width}], got {describe(states)}")
        centred = states if self.centring is None else self.centring.apply(states)
        return centred.float() if self.basis is None else bases.project(centred, self.basis)

    def expand(self, kept: Tensor) -> Tensor:
        """fp32 `[..., L, D]`: the states that `project` was given, as far as they were kept."""
        wide = kept if self.basis is None else bases.expand(kept, self.basis)
        return wide.float() if self.centring is None else self.centring.undo(wide)

    def behind(self, other: Frame) -> Frame:
        """This frame of what `other` keeps. At most one of the two is centred, at most one has a basis."""
        return Frame(
            self.centring if other.centring is None else other.centring,
            self.basis if other.basis is None else other.basis,
        )

    def without(self, other: Frame) -> Frame:
        """What `behind` put before `other`."""
        return Frame(
            self.centring if other.centring is None else None, self.basis if other.basis is None else None
        )

    @property
    def width(self) -> int | None:
        """D; None where nothing says it."""
        if self.centring is not None:
            return self.centring.mean.shape[1]
        return None if self.basis is None else self.basis.shape[1]

    def __bool__(self) -> bool:
        return self.centring is not None or self.basis is not None

    def digest(self) -> str:
        """SHA-256: numbers mean the same under the same frame alone; empty of states as they were."""
        if self.centring is None:
            if self.basis is None:
                return ""
            return bases.digest(self.basis)
        parts = (self.centring.digest(), "" if self.basis is None else bases.digest(self.basis))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __str__(self) -> str:
        """What stands behind a width: ` of 768, centred`."""
        of = "" if self.basis is None else f" of {self.basis.shape[1]}"
        return of if self.centring is None else f"{of}, centred"


def framed(modalities: Sequence[Modality], frames: Mapping[str, Frame]) -> tuple[Modality, ...]:
    """Modalities that say whether they are centred; of a basis their width speaks."""
    return tuple(
        replace(m, frame=frame.digest()) if (frame := frames.get(m.name)) and frame.centring else m
        for m in modalities
    )
