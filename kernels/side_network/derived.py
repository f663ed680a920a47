"""Sources that T projects, or of another width than their tower: dense products on copies of the states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossan_fast.kernels.side_network.data import Data
from crossan_fast.kernels.side_network.gradients import Gradients
from crossan_fast.kernels.side_network.parameters import Parameters
from crossan_fast.kernels.side_network.plan import Source, Tower


@dataclass
class Projected:
    """T_{n→m} c[n] of a chunk: source k of tower m, through pair number `pair` of `projected_pairs`."""

    p: Parameters
    tower: int
    k: int
    modality: int
    pair: int

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        w = self.p.weights
        return w.cross_down[self.pair].to(self.p.dtype), w.cross_up[self.pair].to(self.p.dtype)

    def apply(self, state: Tensor) -> Tensor:
        down, up = self.matrices
        return (state @ down.T) @ up.T

    def source(self, state: Tensor) -> Source:
        return Source(self.apply(state).contiguous(), None, False, self.modality)

    def backward(self, chunk: Data, grad_x: list[Tensor], coef: Tensor, grads: Gradients) -> None:
        dx = grad_x[self.tower]
        scaled = coef[self.tower, :, self.k][None, :, None]
        self.add_gradients(chunk.gather(self.modality, self.p.dtype), dx, scaled, grads)

    def add_gradients(self, state: Tensor, dx: Tensor, scaled: Tensor, grads: Gradients) -> Tensor:
        """Add dT's share, and return the gradient of q = T_down·state, `[n, L, r]`."""
        down, up = self.matrices
        q = (state @ down.T) * scaled
        dq = (dx @ up) * scaled
        q, dq = q.to(dx.dtype), dq.to(dx.dtype)
        grads.dense[0][self.pair] += dq.flatten(0, 1).T @ state.flatten(0, 1)
        grads.dense[1][self.pair] += dx.flatten(0, 1).T @ q.flatten(0, 1)
        return dq


@dataclass
class Narrowed:
    """The wider state of a pair tower brought to the narrower's width by its level's Linear."""

    p: Parameters
    tower: int
    k: int
    modality: int
    pair: int

    def source(self, state: Tensor) -> Source:
        weight = self.p.weights.pair_weight[self.pair].to(self.p.dtype)
        bias = self.p.weights.pair_bias[self.pair].to(self.p.dtype)
        narrow = torch.baddbmm(bias[:, None], state.transpose(0, 1), weight.transpose(1, 2))
        return Source(narrow.transpose(0, 1).contiguous(), None, False, self.modality)

    def backward(self, chunk: Data, grad_x: list[Tensor], coef: Tensor, grads: Gradients) -> None:
        dx = grad_x[self.tower] * coef[self.tower, :, self.k][None, :, None]
        if chunk.items.present is not None:
            dx = torch.where(chunk.items.present[:, self.modality, None, None] != 0, dx, 0)
        state = chunk.gather(self.modality, self.p.dtype).transpose(0, 1)
        grads.dense[2][self.pair] += torch.bmm(dx.to(self.p.dtype).permute(1, 2, 0), state)
        grads.dense[3][self.pair] += dx.sum(0, dtype=torch.float32)


def open_towers(p: Parameters, chunk: Data) -> tuple[list[Tower], list[Projected | Narrowed]]:
    """Every tower with its sources, and those sources that had to be computed.

    With cross="side" pair towers alone: the others read each other's h (`side_levels`).
    """
    structure = p.structure
    projected = {pair: i for i, pair in enumerate(structure.projected_pairs)}
    narrowed = {t: i for i, t in enumerate(structure.narrowed_towers)}
    dense: dict[int, Tensor] = {}
    # One Source object a modality: towers that share it share its slot.
    direct = [chunk.source(m) for m in range(len(structure.widths))]
    derived: list[Projected | Narrowed] = []
    towers = []
    for t, members in enumerate(structure.sources):
        if len(members) == 1 and structure.cross == "side":
            continue
        width = structure.tower_widths[t]
        reads = members
        if len(members) == 1 and structure.cross == "backbone":
            reads = tuple(range(len(structure.widths)))
        sources: list[Source | None] = []
        for k, n in enumerate(reads):
            if structure.widths[n] == width and (t, n) not in projected:
                sources.append(direct[n])
                continue
            if n not in dense:
                dense[n] = chunk.gather(n, p.dtype)
            made: Projected | Narrowed
            if t in narrowed:
                made = Narrowed(p, t, k, n, narrowed[t])
            else:
                made = Projected(p, t, k, n, projected[t, n])
            derived.append(made)
            sources.append(made.source(dense[n]))
        sources += [None] * (p.sources - len(sources))
        towers.append(Tower(t, width, sources, (members[0], members[-1])))
    return towers, derived
