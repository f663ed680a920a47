"""A modality's states around their mean and of one size, each level by itself: `(c − mean) · scale`.

Encoders' states have much in common: most of the norm of CLIP's is the same vector for every item, and is
several times MiniLM's. What all items share says nothing of any, and takes up the towers' weights, bf16's
digits and a basis' first direction.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from crossan_fast.cache.basis import Chunks
from crossan_fast.config import Modality

# A level whose states differ by less, relative to their mean, is one state and its rounding, as that of an
# embedded class token: made of one size, the rounding would be all there is. Half a step of the type they are
# stored in, and of fp32 what states are computed to.
_CONSTANT = {
    torch.float32: 1e-4,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.int8: 2.0**-6,  # of a row whose largest number is twice its root mean square
}


@dataclass(frozen=True, eq=False)
class Centring:
    """Attributes:
    mean: fp32 `[L, D]`.
    scale: fp32 `[L]`; 0 of a level that is the same for every item.
    """

    mean: Tensor
    scale: Tensor

    def apply(self, states: Tensor) -> Tensor:
        """fp32 `[..., L, D]` of `states`; in float64, so that a row's do not depend on its company."""
        mean, scale = self.mean.to(states.device), self.scale.to(states.device)
        return ((states.double() - mean) * scale[:, None].double()).float()

    def undo(self, centred: Tensor) -> Tensor:
        """fp32 `[..., L, D]`: the states that `apply` was given."""
        size = torch.where(self.scale > 0, self.scale.double().reciprocal(), 0)
        return (centred.double() * size[:, None] + self.mean).float()

    def packed(self) -> Tensor:
        """fp32 `[L, D + 1]`: the mean, then the scale."""
        return torch.cat([self.mean, self.scale[:, None]], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Centring:
        return cls(packed[:, :-1].contiguous(), packed[:, -1].contiguous())

    def digest(self) -> str:
        """SHA-256 of its numbers."""
        values = self.packed().contiguous()
        return hashlib.sha256(str(list(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def choose_centring(chunks: Chunks, modality: Modality, dtype: torch.dtype) -> Centring:
    """The mean of a modality's states, and what makes the root mean square of what is left of a level 1.

    Args:
        chunks: called twice; yields the states `[n, L, D]` of items that have the modality, finite.
        dtype: that they are stored in.

    Raises:
        ValueError: fewer than two items have the modality.
    """
    count, total = 0, torch.zeros(modality.levels, modality.width, dtype=torch.float64)
    for block in chunks():
        count += len(block)
        total += block.double().sum(dim=0)
    if count < 2:
        raise ValueError(f"centre: modality {modality.name!r}: expected two items that have it, got {count}")
    mean = (total / count).float()
    squares = torch.zeros(modality.levels, dtype=torch.float64)
    for block in chunks():
        squares += (block.double() - mean).square().sum(dim=(0, 2))
    size = (squares / (count * modality.width)).sqrt()
    common = mean.double().square().mean(dim=1).sqrt()
    differs = (size > _CONSTANT[dtype] * common) & (size >= torch.finfo(torch.float32).tiny)
    return Centring(mean, torch.where(differs, size.reciprocal(), 0).float())
