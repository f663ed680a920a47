"""What a cache's numbers mean: an encoder's states, centred, or as coordinates in a basis, or both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from crossan_fast.cache import basis as bases
from crossan_fast.cache.centring import Centring


@dataclass(frozen=True)
class Frame:
    """How a modality's states are kept: centred first, then as coordinates.

    Attributes:
        centring: None: not centred.
        basis: orthonormal rows, fp32 `[k, D]`; None: all D dimensions.
    """

    centring: Centring | None = None
    basis: Tensor | None = None

    def project(self, states: Tensor) -> Tensor:
        """fp32 `[..., L, k]`: what the cache keeps of an encoder's states `[..., L, D]`."""
        centred = states if self.centring is None else self.centring.apply(states)
        return centred.float() if self.basis is None else bases.project(centred, self.basis)

    def expand(self, kept: Tensor) -> Tensor:
        """fp32 `[..., L, D]`: the states that `project` was given, as far as they were kept."""
        wide = kept if self.basis is None else bases.expand(kept, self.basis)
        return wide.float() if self.centring is None else self.centring.undo(wide)

    def behind(self, other: Frame) -> Frame:
        """This frame of what `other` keeps; one of the two is centred at most, and one has a basis."""
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
        """SHA-256: numbers mean the same under the same frame alone."""
        if self.centring is None:
            assert self.basis is not None
            return bases.digest(self.basis)
        parts = (self.centring.digest(), "" if self.basis is None else bases.digest(self.basis))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
