"""side_network in Triton: host functions (README.md here has the algebra, the tiling and the costs).

Sources whose width is not their tower's are brought to it by plain matrix products over a bounded chunk of
items (they are dense, and cuBLAS's business); with cross="side" levels depend on every tower's h, so each
level is a run of its own. Everything else, the paper's networks included, is one run of the kernels for all
levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._blocks import on_device
from crossan_fast.kernels.side_network.forward_launch import forward_group
from crossan_fast.kernels.side_network.gradient_launch import GroupGradient
from crossan_fast.kernels.side_network.parameters import Items, Level, Parameters
from crossan_fast.kernels.side_network.plan import Source, Tower, group_towers
from crossan_fast.ops._contracts import SideNetworkStructure
from crossan_fast.ops._dispatch import Request

# Items at a time: what bounds the backward's scratch, and the forward's where it has any.
CHUNK = 8192
# The same where states are copied: gathered, projected, or kept for every level.
DENSE_CHUNK = 1024


def refuses(request: Request) -> str | None:
    """See `crossan_fast.ops._triton`."""
    if "states_grad" in request.features:
        return "gives no gradient to states: the backbones are frozen"
    return None


def forward(
    states: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor | None,
    present: Tensor | None,
    weights: Sequence[Tensor],
    *static: Any,
) -> list[Tensor]:
    """Every tower's last h `[N, D_t]`, then per tower the pre-activations z `[N, L, r]` for the backward.

    Arguments are those of the op's schema, on one device and checked. Both are in the compute dtype, zero
    where a tower has no present source.
    """
    *fields, dtype = static
    structure = SideNetworkStructure.from_static(*fields)
    with on_device(states[0]), torch.no_grad():
        p = Parameters(structure.unflatten(weights), structure, dtype)
        data = _Data.of(states, scales or None, ids, present)
        new: dict[str, Any] = {"device": states[0].device, "dtype": dtype}
        outputs = [torch.empty(data.count, width, **new) for width in structure.tower_widths]
        saved = [torch.empty(data.count, p.levels, p.rank, **new) for _ in structure.sources]
        if data.count == 0:
            return [*outputs, *saved]
        level = Level.all(p)
        for chunk, first, last in data.chunks(_chunk_size(structure)):
            here = [t[first:last] for t in outputs]
            z = [t[first:last] for t in saved]
            if structure.cross == "side":
                for number, h in enumerate(_side_levels(p, level, chunk, z)):
                    if number == p.levels:
                        torch._foreach_copy_(here, h)
            else:
                towers, _ = _towers(p, chunk)
                for group in group_towers(towers):
                    forward_group(group, level, chunk.items, here, z)
        return [*outputs, *saved]


def backward(
    grad_outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    states: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor | None,
    present: Tensor | None,
    weights: Sequence[Tensor],
    *static: Any,
) -> list[Tensor]:
    """Gradients of `weights`, in order, each in its weight's dtype; the same bits every run."""
    *fields, dtype = static
    structure = SideNetworkStructure.from_static(*fields)
    with on_device(states[0]), torch.no_grad():
        p = Parameters(structure.unflatten(weights), structure, dtype)
        data = _Data.of(states, scales or None, ids, present)
        if data.count == 0:
            return [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
        grads = _Gradients(p)
        level = Level.all(p)
        g = [t.to(dtype).contiguous() for t in grad_outputs]
        z = [t.contiguous() for t in saved]
        gradients: list[GroupGradient] = []
        for chunk, first, last in data.chunks(_chunk_size(structure)):
            g_chunk, z_chunk = ([t[first:last] for t in group] for group in (g, z))
            if structure.cross == "side":
                _side_backward(p, level, chunk, g_chunk, z_chunk, grads)
                continue
            towers, derived = _towers(p, chunk)
            groups = group_towers(towers)
            if not gradients:
                gradients = [
                    GroupGradient.tuned(group, level, chunk.items, g_chunk, z_chunk) for group in groups
                ]
            grad_x = _grad_x(p, chunk, p.levels) if derived else None
            for gradient, group in zip(gradients, groups, strict=True):
                gradient.add(group, chunk.items, g_chunk, z_chunk, grad_x)
            if grad_x is not None:
                for source in derived:
                    source.backward(chunk, grad_x, level.coef, grads)
        for gradient in gradients:
            gradient.finish(*grads.towers, grads.gate_sum)
        return grads.flatten()


def _chunk_size(structure: SideNetworkStructure) -> int:
    copies = structure.cross == "side" or structure.projected_pairs or structure.narrowed_towers
    return DENSE_CHUNK if copies else CHUNK


# ------------------------------------------------------------------------------------------------- data


@dataclass
class _Data:
    """States and items of a call, or of a chunk of its items."""

    states: list[Tensor]
    scales: list[Tensor] | None
    items: Items

    @classmethod
    def of(
        cls,
        states: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        ids: Tensor | None,
        present: Tensor | None,
    ) -> _Data:
        # Rows and levels may have any stride (a view of a larger cache); D must be dense, to be read in
        # vectors.
        dense = [s if s.stride(-1) == 1 or s.shape[-1] == 1 else s.contiguous() for s in states]
        if scales is not None:
            scales = [s if s.stride(-1) == 1 or s.shape[-1] == 1 else s.contiguous() for s in scales]
        if present is not None:
            present = (present if present.stride(-1) == 1 else present.contiguous()).view(torch.uint8)
        count = states[0].shape[0] if ids is None else ids.shape[0]
        ids = None if ids is None else ids.contiguous()
        return cls(dense, None if scales is None else list(scales), Items(count, ids, present))

    @property
    def count(self) -> int:
        return self.items.count

    def chunks(self, size: int) -> Iterator[tuple[_Data, int, int]]:
        """The data of at most `size` items at a time, with the items' range."""
        for first in range(0, self.count, size):
            last = min(first + size, self.count)
            ids, present = self.items.ids, self.items.present
            items = Items(
                last - first,
                None if ids is None else ids[first:last],
                None if present is None else present[first:last],
            )
            if ids is not None:
                yield _Data(self.states, self.scales, items), first, last
            else:
                scales = None if self.scales is None else [s[first:last] for s in self.scales]
                yield _Data([s[first:last] for s in self.states], scales, items), first, last

    def source(self, m: int) -> Source:
        scale = None if self.scales is None else self.scales[m]
        return Source(self.states[m], scale, self.items.ids is not None, m)

    def one_level(self, level: int) -> _Data:
        one = slice(level, level + 1)
        scales = None if self.scales is None else [s[:, one] for s in self.scales]
        return _Data([s[:, one] for s in self.states], scales, self.items)

    def gather(self, m: int, dtype: torch.dtype) -> Tensor:
        """States of modality m, `[n, L, D_m]`, converted; zero where absent."""
        ids, state = self.items.ids, self.states[m]
        if ids is not None:
            kept = state.view(torch.uint8) if state.element_size() == 1 else state
            state = kept.index_select(0, ids).view(state.dtype)
        if self.scales is None:
            state = state.to(dtype)
        else:
            scale = self.scales[m] if ids is None else self.scales[m].index_select(0, ids)
            state = (state.float() * scale[..., None]).to(dtype)
        if self.items.present is None:
            return state
        return torch.where(self.items.present[:, m, None, None] != 0, state, 0)


# ---------------------------------------------------------------------------------------------- gradients


class _Gradients:
    """Where gradients are written: per field a list, fp32 where they are added up over chunks or levels."""

    def __init__(self, p: Parameters) -> None:
        self.p = p
        w = p.weights
        adds = p.structure.cross == "side"
        self.towers = [
            [torch.zeros_like(t, dtype=torch.float32) for t in group] if adds else _like(group)
            for group in (w.down_weight, w.down_bias, w.up_weight, w.up_bias)
        ]
        self.dense = [
            [torch.zeros_like(t, dtype=torch.float32) for t in group]
            for group in (w.cross_down, w.cross_up, w.pair_weight, w.pair_bias)
        ]
        k = p.sources + 1
        self.gate_sum = torch.zeros(len(p.gate), p.levels, k, device=p.device)

    def flatten(self) -> list[Tensor]:
        down_weight, down_bias, up_weight, up_bias = self.towers
        gate, cross_gate = self.p.gate_gradients(self.gate_sum)
        groups = [down_weight, down_bias, up_weight, up_bias, gate, cross_gate, *self.dense]
        flat = [t for group in groups for t in group]
        return [g.to(w.dtype) for g, w in zip(flat, self.p.weights.flatten(), strict=True)]


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous memory for gradients, in the tensors' dtype (fp32 where they differ)."""
    kinds = {t.dtype for t in tensors}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    return [torch.empty(t.shape, device=t.device, dtype=dtype) for t in tensors]


def _grad_x(p: Parameters, chunk: _Data, levels: int) -> list[Tensor]:
    new: dict[str, Any] = {"device": p.device, "dtype": p.dtype}
    return [torch.empty(chunk.count, levels, width, **new) for width in p.structure.tower_widths]


# ----------------------------------------------------------------------------------------- derived sources


@dataclass
class _Projected:
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

    def source(self, state: Tensor) -> Source:
        down, up = self.matrices
        return Source(((state @ down.T) @ up.T).contiguous(), None, False, self.modality)

    def backward(self, chunk: _Data, grad_x: list[Tensor], coef: Tensor, grads: _Gradients) -> None:
        dx = grad_x[self.tower]
        scaled = coef[self.tower, :, self.k][None, :, None]
        self.add_gradients(chunk.gather(self.modality, self.p.dtype), dx, scaled, grads)

    def add_gradients(self, state: Tensor, dx: Tensor, scaled: Tensor, grads: _Gradients) -> Tensor:
        """Add dT's share, and return the gradient of q = T_down·state, `[n, L, r]`."""
        down, up = self.matrices
        q = (state @ down.T) * scaled
        dq = (dx @ up) * scaled
        q, dq = q.to(dx.dtype), dq.to(dx.dtype)
        grads.dense[0][self.pair] += dq.flatten(0, 1).T @ state.flatten(0, 1)
        grads.dense[1][self.pair] += dx.flatten(0, 1).T @ q.flatten(0, 1)
        return dq


@dataclass
class _Narrowed:
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

    def backward(self, chunk: _Data, grad_x: list[Tensor], coef: Tensor, grads: _Gradients) -> None:
        dx = grad_x[self.tower] * coef[self.tower, :, self.k][None, :, None]
        if chunk.items.present is not None:
            dx = torch.where(chunk.items.present[:, self.modality, None, None] != 0, dx, 0)
        state = chunk.gather(self.modality, self.p.dtype).transpose(0, 1)
        grads.dense[2][self.pair] += torch.bmm(dx.to(self.p.dtype).permute(1, 2, 0), state)
        grads.dense[3][self.pair] += dx.sum(0, dtype=torch.float32)


def _towers(p: Parameters, chunk: _Data) -> tuple[list[Tower], list[_Projected | _Narrowed]]:
    """Every tower with its sources, and those sources that had to be computed."""
    structure = p.structure
    projected = {pair: i for i, pair in enumerate(structure.projected_pairs)}
    narrowed = {t: i for i, t in enumerate(structure.narrowed_towers)}
    dense: dict[int, Tensor] = {}
    # One Source object a modality: towers that share it share its slot.
    direct = [chunk.source(m) for m in range(len(structure.widths))]
    derived: list[_Projected | _Narrowed] = []
    towers = []
    for t, members in enumerate(structure.sources):
        width = structure.tower_widths[t]
        reads = members
        if len(members) == 1 and structure.cross == "backbone":
            reads = tuple(range(len(structure.widths)))
        sources: list[Source | None] = []
        for k, n in enumerate(reads):
            if structure.widths[n] == width:
                sources.append(direct[n])
                continue
            if n not in dense:
                dense[n] = chunk.gather(n, p.dtype)
            made: _Projected | _Narrowed
            if t in narrowed:
                made = _Narrowed(p, t, k, n, narrowed[t])
            else:
                made = _Projected(p, t, k, n, projected[t, n])
            derived.append(made)
            sources.append(made.source(dense[n]))
        sources += [None] * (p.sources - len(sources))
        towers.append(Tower(t, width, sources, (members[0], members[-1])))
    return towers, derived


# ------------------------------------------------------------------------------------------- cross="side"


def _side_towers(p: Parameters, chunk: _Data, h: Sequence[Tensor]) -> tuple[list[Tower], list[_Projected]]:
    """The towers of one level, whose sources are its own state, then every tower's h of the level before."""
    structure = p.structure
    projected = {pair: i for i, pair in enumerate(structure.projected_pairs)}
    before = [Source(t[:, None], None, False, -1) for t in h]
    derived: list[_Projected] = []
    towers = []
    for m, width in enumerate(structure.widths):
        sources: list[Source | None] = [chunk.source(m)]
        for n, source in enumerate(before):
            if (m, n) in projected:
                made = _Projected(p, m, n + 1, n, projected[m, n])
                derived.append(made)
                source = made.source(h[n][:, None])
            sources.append(source)
        towers.append(Tower(m, width, sources, (m, m)))
    return towers, derived


def _side_levels(
    p: Parameters, level: Level, chunk: _Data, saved: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """h before each level, then the last one; fills `saved`."""
    h = [torch.zeros(chunk.count, w, device=p.device, dtype=p.dtype) for w in p.structure.widths]
    z = [torch.empty(chunk.count, 1, p.rank, device=p.device, dtype=p.dtype) for _ in h]
    for number in range(p.levels):
        yield h
        after = [torch.empty_like(t) for t in h]
        towers, _ = _side_towers(p, chunk.one_level(number), h)
        for group in group_towers(towers):
            forward_group(group, level.one(number), chunk.items, after, z)
        torch._foreach_copy_([t[:, number : number + 1] for t in saved], z)
        h = after
    yield h


def _side_backward(
    p: Parameters, level: Level, chunk: _Data, g: list[Tensor], saved: list[Tensor], grads: _Gradients
) -> None:
    """Add a chunk's gradients, the last level first; every level's h is computed again and kept meanwhile."""
    states = list(_side_levels(p, level, chunk, [torch.empty_like(t) for t in saved]))
    for number in reversed(range(p.levels)):
        h, here, one = states[number], chunk.one_level(number), level.one(number)
        towers, derived = _side_towers(p, here, h)
        dx = _grad_x(p, chunk, 1)
        fresh = [[torch.empty_like(t[number : number + 1]) for t in group] for group in grads.towers]
        gate_sum = torch.zeros_like(grads.gate_sum[:, :1])
        z = [t[:, number : number + 1].contiguous() for t in saved]
        for group in group_towers(towers):
            gradient = GroupGradient.tuned(group, one, chunk.items, g, z)
            gradient.add(group, chunk.items, g, z, dx)
            gradient.finish(*fresh, gate_sum)
        for total, new in zip(grads.towers, fresh, strict=True):
            for t, share in zip(total, new, strict=True):
                t[number : number + 1] += share
        # The coefficient of the tower's own h is a source's here, and the carry's in the gates' chain rule.
        for m in range(len(h)):
            grads.gate_sum[m, number, : p.sources] += gate_sum[m, 0, : p.sources]
        before = [torch.zeros_like(t, dtype=torch.float32) for t in h]
        through = {(d.tower, d.modality): d for d in derived}
        for m in range(len(h)):
            for n in range(len(h)):
                scaled = one.coef[m, 0, n + 1]
                if (m, n) in through:
                    pair = through[m, n]
                    dq = pair.add_gradients(h[n][:, None], dx[m], scaled, grads)
                    before[n] += (dq @ pair.matrices[0])[:, 0]
                else:
                    before[n] += scaled * dx[m][:, 0]
        g = [t.to(p.dtype) for t in before]
