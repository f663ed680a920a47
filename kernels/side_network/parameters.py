"""What the side network's launches share: packed weights, what is formed of them once, what a chunk is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import bucket
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import dot_precision, launch, power_of_two, uniform
from crossan_fast.kernels.side_network import gate_kernels
from crossan_fast.ops._contracts import SideNetworkStructure, SideNetworkWeights
from crossan_fast.ops._kept import Layout, mixing_size, operands_of


@dataclass
class Kept:
    """What a forward makes of the weights, in memory that its backward is given.

    Attributes:
        memory: flat, fp32.
        filled: a forward has filled it.
    """

    layout: Layout
    memory: Tensor
    filled: bool

    def view(self, start: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape)
        numbers = self.memory[start : start + cdiv(size * dtype.itemsize, 4)]
        return numbers.view(dtype)[:size].view(shape)


@dataclass
class Parameters:
    """Weights as the kernels read them: contiguous, the products' operands in the compute dtype.

    With `kept`, what is made of them lies there, and is not made where it is filled.
    """

    weights: SideNetworkWeights
    structure: SideNetworkStructure
    dtype: torch.dtype
    kept: Kept | None = None

    def __post_init__(self) -> None:
        towers, operands = len(self.weights.gate), self._operands()
        self.down_weight, self.up_weight, self.head_weight = (
            operands[first : first + towers] for first in range(0, 3 * towers, towers)
        )
        self.down_bias = uniform(self.weights.down_bias)
        self.up_bias = uniform(self.weights.up_bias)
        self.head_bias = uniform(self.weights.head_bias)
        self.gate = uniform(self.weights.gate)
        self.cross_gate = uniform(self.weights.cross_gate) if self.weights.cross_gate else []
        self.levels, self.rank = self.down_weight[0].shape[:2]
        self.embedding = self.head_weight[0].shape[0]
        self.block_r, self.block_e = power_of_two(self.rank), power_of_two(self.embedding)
        self.device = self.down_weight[0].device
        # Of what is added up; torch's default dtype is its caller's.
        self.wide: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        self.precision = dot_precision(self.dtype)
        self.gelu = self.structure.activation == "gelu"

    def _operands(self) -> list[Tensor]:
        own, kept = operands_of(self.weights), self.kept
        if kept is None or not kept.layout.operands:
            return uniform(own, self.dtype)
        starts = kept.layout.operands
        cast = [kept.view(at, *w.shape, dtype=self.dtype) for at, w in zip(starts, own, strict=True)]
        if not kept.filled:
            torch._foreach_copy_(cast, [w.detach() for w in own])  # on a GPU one launch for all
        return cast

    @cached_property
    def kinds(self) -> list[list[int]]:
        """Per tower the gate of each of its sources: −1 μ, −2 1 − μ, n ≥ 0 tanh(cross_gate[n])."""
        pairs = {pair: i for i, pair in enumerate(self.structure.cross_pairs)}
        rows = []
        for source in self.structure.sources:
            if len(source) == 2:
                rows.append([-1, -2])
            elif self.structure.cross == "none":
                rows.append([-1])
            else:
                m, everyone = source[0], range(len(self.structure.widths))
                own = -1 if self.structure.cross == "backbone" else -2
                row = [own if n == m else pairs[m, n] for n in everyone]
                rows.append(row if self.structure.cross == "backbone" else [-1, *row])
        return rows

    @cached_property
    def sources(self) -> int:
        """K: the most sources that any tower has."""
        return max(len(row) for row in self.kinds)

    @property
    def gate_constants(self) -> dict[str, Any]:
        return {
            "KINDS": tuple(k for row in self.kinds for k in row + [-3] * (self.sources - len(row))),
            "PAIRED": tuple(len(source) == 2 for source in self.structure.sources),
            "L": self.levels,
            "K": self.sources,
            "BLOCK_L": power_of_two(self.levels),
        }

    @property
    def row(self) -> int:
        """Numbers an item's row of products has: each level's, then the head's."""
        return self.levels * self.block_r + self.block_e

    def sizes(self, width: int) -> tuple[int, ...]:
        """SIZES: L, D, R, E, K and the number of towers in the network."""
        return self.levels, width, self.rank, self.embedding, self.sources, len(self.gate)

    @cached_property
    def gates(self) -> tuple[Tensor, Tensor]:
        """coef `[T, L, K]` and carry `[T, L]`, fp32."""
        towers = len(self.gate)
        if self.kept is None:
            coef = torch.empty(towers, self.levels, self.sources, **self.wide)
            carry = torch.empty(towers, self.levels, **self.wide)
        else:
            coef = self.kept.view(self.kept.layout.coef, towers, self.levels, self.sources)
            carry = self.kept.view(self.kept.layout.carry, towers, self.levels)
            if self.kept.filled:
                return coef, carry
        launch(
            gate_kernels.coefficients_kernel,
            (1,),
            tuple(self.gate),
            tuple(self.cross_gate),
            coef,
            carry,
            1.0 / self.structure.temperature,
            **self.gate_constants,
            num_warps=1,
        )
        return coef, carry

    def gate_gradients(self, gate_sum: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of θ and ν from the sums `[T, L, K + 1]`."""
        gate_grads = [torch.empty_like(g) for g in self.gate]
        cross_grads = [torch.empty_like(g) for g in self.cross_gate]
        launch(
            gate_kernels.gate_gradient_kernel,
            (1,),
            tuple(self.gate),
            tuple(self.cross_gate),
            gate_sum,
            tuple(gate_grads),
            tuple(cross_grads),
            1.0 / self.structure.temperature,
            **self.gate_constants,
            num_warps=1,
        )
        return gate_grads, cross_grads

    @cached_property
    def mixing(self) -> tuple[Tensor, Tensor | None]:
        """G, flat per tower in the compute dtype, and constants `[T, ROW]` in fp32 (forward_kernels.py).

        A backward does without the latter.
        """
        br, be, levels, towers = self.block_r, self.block_e, self.levels, len(self.gate)
        size = mixing_size(levels, br, be)
        if self.kept is None:
            mixing = torch.empty(towers, size, device=self.device, dtype=self.dtype)
        else:
            mixing = self.kept.view(self.kept.layout.mixing, towers, size, dtype=self.dtype)
            if self.kept.filled:
                return mixing, None
        constants = torch.empty(towers, self.row, **self.wide)
        rows, columns = min(64, br, be), min(64, br)
        launch(
            gate_kernels.mixing_kernel,
            ((levels + 1) * (levels + 2) // 2, towers, max(br, be) // rows * (br // columns)),
            (tuple(self.down_weight), tuple(self.up_weight), tuple(self.head_weight)),
            (tuple(self.down_bias), tuple(self.up_bias), tuple(self.head_bias)),
            self.gates[1],
            mixing,
            constants,
            WIDTHS=self.structure.tower_widths,
            ALIGNED=all(width % 16 == 0 for width in self.structure.tower_widths),
            SIZES=self.sizes(0),
            BLOCK_I=rows,
            BLOCK_J=columns,
            BLOCK_D=64 if self.dtype != torch.float32 else 32,
            BLOCK_R=br,
            BLOCK_E=be,
            PRECISION=self.precision,
            num_warps=4,
        )
        return mixing, constants


@dataclass
class Items:
    """A chunk of items: its size, ids and presence."""

    count: int
    ids: Tensor | None
    present: Tensor | None

    @property
    def bucket(self) -> int:
        """The least power of two ≥ count: configs depend on no more."""
        return bucket(self.count)

    @property
    def presence(self) -> tuple[Tensor | None, int]:
        return self.present, 0 if self.present is None else self.present.stride(0)
