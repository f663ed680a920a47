"""cross="side": each level reads every tower's h of the level before, so that h is made, level by level.

All of it is dense products on a chunk's copy of the states, over all towers of one width at once; the
backward makes each level's h again. Presence makes the coupling of the towers differ by item, which rules out
the matrices that fold heads and up-projections in elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast.kernels.side_network.data import Data
from crossan_fast.kernels.side_network.derived import Projected
from crossan_fast.kernels.side_network.gradients import Gradients
from crossan_fast.kernels.side_network.parameters import Parameters


@dataclass
class _Towers:
    """The towers of one width, G of them, on a chunk of n items.

    Attributes:
        numbers: which they are.
        states: `[G, n, L, D]` in the compute dtype, zero where absent.
        exists: `[G, n, 1]`, or None: everywhere.
    """

    p: Parameters
    numbers: list[int]
    states: Tensor
    exists: Tensor | None

    @cached_property
    def coef(self) -> Tensor:
        """Coefficients `[L, G, K]`."""
        return self.stack(self.p.gates[0]).transpose(0, 1)

    @cached_property
    def mutual(self) -> Tensor:
        """Coefficients of these towers' h, as it is, in each other's sums, `[L, G, G]`."""
        columns = torch.stack([self.coef[:, :, n + 1] for n in self.numbers], 2)
        # With T between any two towers, what enters as it is is each one's own h alone.
        low_rank = self.p.structure.cross_projection == "low_rank"
        return torch.diag_embed(columns.diagonal(dim1=1, dim2=2)) if low_rank else columns

    def stack(self, tensors: Sequence[Tensor] | Tensor) -> Tensor:
        # Not by a list as index: that would be copied to the device, and waited for.
        return torch.stack([tensors[m] for m in self.numbers])

    def at(self, level: int, tensors: Sequence[Tensor]) -> Tensor:
        """A level of weights `[L, …]`."""
        return torch.stack([tensors[m][level] for m in self.numbers])

    def mask(self, x: Tensor) -> Tensor:
        return x if self.exists is None else torch.where(self.exists, x, 0)

    def sums(self, level: int, h: Sequence[Tensor], projected: Sequence[Projected]) -> Tensor:
        """x of a level from every tower's h `[n, D]` of the level before, fp32 `[G, n, D]`."""
        coef = self.coef[level]
        x = coef[:, 0, None, None] * self.states[:, :, level]
        x += (self.mutual[level] @ self.stack(h).flatten(1).float()).view_as(x)
        for pair in projected:
            if pair.tower in self.numbers:
                i = self.numbers.index(pair.tower)
                x[i] += coef[i, pair.k] * pair.apply(h[pair.modality])
        return x

    def bottleneck(self, level: int, x: Tensor) -> Tensor:
        """z `[G, n, r]`."""
        weight, bias = self.at(level, self.p.down_weight), self.at(level, self.p.down_bias)
        return self.mask((x.to(weight.dtype) @ weight.mT + bias[:, None].float()).to(weight.dtype))

    def activate(self, z: Tensor) -> Tensor:
        return (F.gelu(z.float()) if self.p.gelu else F.relu(z)).to(z.dtype)

    def hidden(self, level: int, x: Tensor, z: Tensor) -> Tensor:
        """h `[G, n, D]`."""
        weight, bias = self.at(level, self.p.up_weight), self.at(level, self.p.up_bias)
        return self.mask(x + self.activate(z) @ weight.mT + bias[:, None].float()).to(weight.dtype)


def forward(p: Parameters, chunk: Data, out: Tensor, saved: Tensor) -> None:
    """Fill a chunk's e `[n, T, d]` and z `[T, n, L, r]`."""
    groups, projected = _open(p, chunk)
    h = _levels(p, groups, projected, chunk.count, saved)[-1]
    for group in groups:
        weight = group.stack(p.head_weight)
        bias = group.stack(p.head_bias)[:, None].float()
        e = group.mask(group.stack(h) @ weight.mT + bias)
        _copy(out.unbind(1), group, e)


def backward(p: Parameters, chunk: Data, grad_out: Tensor, saved: Tensor, grads: Gradients) -> None:
    """Add a chunk's gradients, the last level first."""
    groups, projected = _open(p, chunk)
    states = _levels(p, groups, projected, chunk.count)
    g = list(states[-1])
    for group in groups:
        ge = group.mask(group.stack(grad_out.unbind(1)))  # [G, n, d]
        _add(grads.weights[2], group, ge.mT @ group.stack(states[-1]))
        _add(grads.biases[2], group, ge.sum(1, dtype=torch.float32))
        _scatter(g, group, ge @ group.stack(p.head_weight))
    for level in reversed(range(p.levels)):
        h, dx = states[level], list(g)
        for group in groups:
            z = group.stack(saved[:, :, level])
            _scatter(dx, group, _level_backward(group, level, h, projected, z, group.stack(g), grads))
        g = _before(p, level, groups, projected, h, dx, grads)


def _open(p: Parameters, chunk: Data) -> tuple[list[_Towers], list[Projected]]:
    widths, present = p.structure.widths, chunk.items.present
    groups = []
    for width in sorted(set(widths)):
        numbers = [m for m, own in enumerate(widths) if own == width]
        states = torch.stack([chunk.gather(m, p.dtype) for m in numbers])
        exists = None if present is None else torch.stack([present[:, m, None] != 0 for m in numbers])
        groups.append(_Towers(p, numbers, states, exists))
    pairs = enumerate(p.structure.projected_pairs)
    return groups, [Projected(p, m, n + 1, n, i) for i, (m, n) in pairs]


def _levels(
    p: Parameters,
    groups: list[_Towers],
    projected: list[Projected],
    count: int,
    saved: Tensor | None = None,
) -> list[list[Tensor]]:
    """Every tower's h `[n, D]` before each level, then the last; fills `saved`."""
    h = [torch.zeros(count, width, device=p.device, dtype=p.dtype) for width in p.structure.widths]
    found = [h]
    for level in range(p.levels):
        after = list(h)
        for group in groups:
            x = group.sums(level, h, projected)
            z = group.bottleneck(level, x)
            if saved is not None:
                _copy(saved[:, :, level], group, z)
            _scatter(after, group, group.hidden(level, x, z))
        h = after
        found.append(h)
    return found


def _level_backward(
    group: _Towers,
    level: int,
    h: list[Tensor],
    projected: list[Projected],
    z: Tensor,
    g: Tensor,
    grads: Gradients,
) -> Tensor:
    """dx `[G, n, D]` from g of the level's h; adds the gradients of its weights and its own coefficient."""
    p, g = group.p, group.mask(g)
    x = group.sums(level, h, projected).to(p.dtype)
    da = (g @ group.at(level, p.up_weight)).float()
    wide = z.float()
    dz = torch.ops.aten.gelu_backward(da, wide) if p.gelu else torch.where(wide > 0, da, 0)
    dz = dz.to(p.dtype)
    dx = (g.float() + dz @ group.at(level, p.down_weight)).to(p.dtype)
    _add(grads.weights[0], group, dz.mT @ x, level)
    _add(grads.biases[0], group, dz.sum(1, dtype=torch.float32), level)
    _add(grads.weights[1], group, g.mT @ group.activate(z), level)
    _add(grads.biases[1], group, g.sum(1, dtype=torch.float32), level)
    _add(grads.gate_sum[:, level, 0], group, _inner(dx, group.states[:, :, level]))
    return dx


def _before(
    p: Parameters,
    level: int,
    groups: list[_Towers],
    projected: list[Projected],
    h: list[Tensor],
    dx: list[Tensor],
    grads: Gradients,
) -> list[Tensor]:
    """The gradients of every tower's h of the level before; adds those of the coefficients and of T."""
    before = [torch.zeros_like(t, dtype=torch.float32) for t in h]
    for group in groups:
        gradients, hidden = (group.stack(t).flatten(1).float() for t in (dx, h))
        _add(before, group, (group.mutual[level].T @ gradients).view(-1, *h[group.numbers[0]].shape))
        products = gradients @ hidden.T  # [G, G]
        if p.structure.cross_projection == "low_rank":
            products = products.diagonal().diag()
        for n, column in zip(group.numbers, products.T, strict=True):
            _add(grads.gate_sum[:, level, n + 1], group, column)
    for pair in projected:
        m, n = pair.tower, pair.modality
        scaled = p.gates[0][m, level, pair.k]
        grads.gate_sum[m, level, pair.k] += _inner(dx[m][None], pair.apply(h[n])[None])[0]
        dq = pair.add_gradients(h[n][:, None], dx[m][:, None], scaled, grads)
        before[n] += (dq @ pair.matrices[0])[:, 0]
    return [t.to(p.dtype) for t in before]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a[i], b[i]⟩, fp32."""
    return (a.float() * b).sum((1, 2))


def _scatter(towers: list[Tensor], group: _Towers, values: Tensor) -> None:
    for m, value in zip(group.numbers, values, strict=True):
        towers[m] = value


def _copy(towers: Sequence[Tensor] | Tensor, group: _Towers, values: Tensor) -> None:
    for m, value in zip(group.numbers, values, strict=True):
        towers[m].copy_(value)


def _add(totals: Sequence[Tensor] | Tensor, group: _Towers, shares: Tensor, level: int | None = None) -> None:
    for m, share in zip(group.numbers, shares, strict=True):
        total = totals[m] if level is None else totals[m][level]
        total += share
