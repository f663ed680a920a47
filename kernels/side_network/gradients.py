"""Where a call's gradients are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast.kernels.side_network.parameters import Parameters


class Gradients:
    """Per field of the weights a list, fp32 where they are added up over chunks.

    Attributes:
        weights, biases: of down, up and head, a tensor per tower.
        dense: of T's two matrices, and of the pairs' Linear.
        gate_sum: `[T, L, K + 1]`, what reaches each coefficient, then the carry.
    """

    def __init__(self, p: Parameters) -> None:
        self.p = p
        w = p.weights
        new = _zeros if p.structure.cross == "side" else _like
        self.weights = [new(group) for group in (w.down_weight, w.up_weight, w.head_weight)]
        self.biases = [new(group) for group in (w.down_bias, w.up_bias, w.head_bias)]
        self.dense = [_zeros(group) for group in (w.cross_down, w.cross_up, w.pair_weight, w.pair_bias)]
        # Groups of towers cover it; only cross="side" adds to it.
        make = torch.zeros if p.structure.cross == "side" else torch.empty
        self.gate_sum = make(len(p.gate), p.levels, p.sources + 1, **p.wide)

    def flatten(self) -> list[Tensor]:
        """In the order and the types of the weights."""
        down, up, head = zip(self.weights, self.biases, strict=True)
        gate, cross_gate = self.p.gate_gradients(self.gate_sum)
        groups = [*down, *up, gate, *head, cross_gate, *self.dense]
        flat = [t for group in groups for t in group]
        return [g.to(w.dtype) for g, w in zip(flat, self.p.weights.flatten(), strict=True)]


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros(t.shape, device=t.device, dtype=torch.float32) for t in tensors]


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous memory for gradients, in the tensors' dtype (fp32 where they differ)."""
    kinds = {t.dtype for t in tensors}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    return [torch.empty(t.shape, device=t.device, dtype=dtype) for t in tensors]
