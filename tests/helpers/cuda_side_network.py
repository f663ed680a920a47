"""side_network's CUDA kernels against float64 and the definition, h and all: on the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
from judging import judge_all, together
from torch import Tensor

from crossan_fast.cache.quantize import quantize
from crossan_fast.ops._passes import joined
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    SideNetworkWeights,
    side_network_reference,
)

MMA, HOPPER = 1, 2
# Of a problem that is judged: whether rounding turns a sign of z in one, or what is left of a gate's sum, is
# chance.
DRAWS = 4

Problem = tuple[list[Tensor], list[Tensor] | None, Tensor | None, Tensor | None, SideNetworkWeights, Tensor]
Results = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Case:
    items: int = 40
    widths: tuple[int, ...] = (128, 128)
    levels: int = 3
    rank: int = 64
    embedding: int = 24
    cross: str = "backbone"
    pairs: bool = False
    activation: str = "gelu"
    stored: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    ids: torch.dtype | None = torch.int64
    presence: bool = False
    gates: tuple[float, ...] = ()  # θ of the levels; drawn where empty
    rows: int = 57
    device: str = "cpu"

    @property
    def structure(self) -> SideNetworkStructure:
        count = len(self.widths)
        sources: tuple[tuple[int, ...], ...] = tuple((m,) for m in range(count))
        if self.pairs:
            sources += tuple(combinations(range(count), 2))
        cross = self.cross if count > 1 else "none"
        return SideNetworkStructure(self.widths, sources, cross, self.activation, 0.5)

    def make(self, seed: int = 0) -> Problem:
        """States, scales, ids, present, weights, and the embeddings' gradient."""
        generator = torch.Generator().manual_seed(seed)
        structure = self.structure

        def draw(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(self.device)

        # Values of the compute type, so that only the kernels' own roundings remain.
        def weight(*shape, scale):
            return draw(*shape, scale=scale).to(self.dtype).to(self.weights)

        levels, rank, widths = self.levels, self.rank, structure.tower_widths
        weights = SideNetworkWeights(
            down_weight=[weight(levels, rank, width, scale=width**-0.5) for width in widths],
            down_bias=[weight(levels, rank, scale=0.2) for _ in widths],
            up_weight=[weight(levels, width, rank, scale=rank**-0.5) for width in widths],
            up_bias=[weight(levels, width, scale=0.2) for width in widths],
            gate=[weight(levels, scale=0.5) for _ in widths],
            head_weight=[weight(self.embedding, width, scale=width**-0.5) for width in widths],
            head_bias=[weight(self.embedding, scale=0.2) for _ in widths],
            cross_gate=[weight(levels, scale=0.5) for _ in structure.cross_pairs],
        )
        for tensor in weights.gate if self.gates else ():
            tensor.copy_(torch.tensor(self.gates))
        rows = self.rows if self.ids else self.items
        states, scales = [draw(rows, levels, width) for width in self.widths], None
        if self.stored in (torch.int8, torch.float8_e4m3fn):
            states, scales = map(list, zip(*(quantize(s, self.stored) for s in states), strict=True))
        else:
            states = [s.to(self.stored) for s in states]
        ids = present = None
        if self.ids:
            ids = torch.randint(0, rows, (self.items,), generator=generator).to(self.device, self.ids)
        if self.presence:
            present = (torch.rand(self.items, len(self.widths), generator=generator) < 0.6).to(self.device)
            present[: self.items // 4] = False
        grad = draw(self.items, len(widths), self.embedding).to(self.dtype)
        return states, scales, ids, present, weights, grad

    def static(self, path: int, backward_items: int = 0) -> tuple[Any, ...]:
        """The end of the arguments that the library's ops take."""
        return (*self.structure.static, self.dtype, path, backward_items)

    def arguments(self, path: int, seed: int = 0, backward_items: int = 0) -> tuple[Any, ...]:
        """Those of the library's forward, which the backward's end with."""
        states, scales, ids, present, weights, _ = self.make(seed)
        return (states, scales or [], ids, present, weights.flatten(), *self.static(path, backward_items))

    def reference(self, dtype: torch.dtype, seed: int = 0) -> Results:
        """Embeddings, and gradients of all weights, by autograd through the definition."""
        states, scales, ids, present, weights, grad = self.make(seed)
        flat = [w.to(dtype).requires_grad_() for w in weights.flatten()]
        embeddings = side_network_reference(
            states,
            self.structure.unflatten(flat),
            self.structure,
            ids=ids,
            scales=scales,
            present=present,
            dtype=dtype,
        )
        embeddings.backward(grad.to(dtype))
        gradients = [w.grad for w in flat]
        return embeddings.detach(), [g for g in gradients if g is not None]

    def run(
        self, ops: Any, path: int, seed: int = 0, backward_items: int = 0
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Embeddings, z and gradients of all weights by the library `ops`."""
        arguments = self.arguments(path, seed, backward_items)
        embeddings, saved, links = ops.side_network(*arguments)
        assert links.shape == (len(self.structure.sources), 0)
        grad = self.make(seed)[-1]
        return embeddings, saved, ops.side_network_backward(grad, saved, links, *arguments)

    def check(
        self, ops: Any, path: int, backward_items: int = 0, draws: int = DRAWS
    ) -> tuple[Tensor, Tensor]:
        """Judge what `run` gives by eager's errors in the same type; embeddings and z of the first draw."""
        runs = [self.run(ops, path, seed, backward_items) for seed in range(draws)]
        for embeddings, saved, grads in runs:
            assert embeddings.dtype == self.dtype and all(g.dtype == self.weights for g in grads)
            assert saved.shape == (len(self.structure.sources), self.items, self.levels, self.rank)
            assert saved.isfinite().all()
        exact = [self.reference(torch.float64, seed) for seed in range(draws)]
        groups = self.structure.unflatten(exact[0][1])._asdict()
        judge_all(
            ["embeddings", *(name for name, group in groups.items() if group)],
            self._together((embeddings, grads) for embeddings, _, grads in runs),
            lambda: self._together(self.reference(self.dtype, seed) for seed in range(draws)),
            self._together(exact),
        )
        return runs[0][:2]

    def _together(self, results: Iterable[Results]) -> list[Tensor]:
        # A gate's gradient is one sum over everything, whose terms cancel: judged by all gates of a kind.
        return together(
            [
                embeddings,
                *(torch.cat([t.flatten() for t in g]) for g in self.structure.unflatten(grads) if g),
            ]
            for embeddings, grads in results
        )


def by_passes(forward: str, backward: str) -> SimpleNamespace:
    """What `Case.run` takes as `ops`: the registered op, with a backend for each pass."""
    registered, name = torch.ops.crossan_fast, joined(forward, backward)

    def run_forward(*arguments):
        e, saved, _ = registered.side_network(*arguments[:-2], name)
        return e, saved, e.new_zeros(saved.shape[0], 0)  # what is kept of weights is the CPU's affair

    def run_backward(*arguments):
        return registered.side_network_backward(*arguments[:-2], name)

    return SimpleNamespace(side_network=run_forward, side_network_backward=run_backward)


def error(got: Tensor, exact: Tensor) -> float:
    """Of the whole, relative."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))
