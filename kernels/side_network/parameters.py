"""What the side network's launches share: packed weights, gates' values, what a level and a chunk are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import bucket
from crossan_fast.kernels._common import dot_precision, launch, power_of_two, uniform
from crossan_fast.kernels.side_network import gate_kernels
from crossan_fast.ops._contracts import SideNetworkStructure, SideNetworkWeights


@dataclass
class Parameters:
    """Weights as the kernels read them: contiguous, the products' operands in the compute dtype."""

    weights: SideNetworkWeights
    structure: SideNetworkStructure
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.down_weight = uniform(self.weights.down_weight, self.dtype)
        self.up_weight = uniform(self.weights.up_weight, self.dtype)
        self.down_bias = uniform(self.weights.down_bias)
        self.up_bias = uniform(self.weights.up_bias)
        self.gate = uniform(self.weights.gate)
        self.cross_gate = uniform(self.weights.cross_gate) if self.weights.cross_gate else []
        self.levels, self.rank = self.down_weight[0].shape[:2]
        self.device = self.down_weight[0].device
        self.precision = dot_precision(self.dtype)
        self.gelu = self.structure.activation == "gelu"

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

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """coef `[T, L, K]` and carry `[T, L]`, fp32."""
        towers = len(self.gate)
        coef = torch.empty(towers, self.levels, self.sources, device=self.device)
        carry = torch.empty(towers, self.levels, device=self.device)
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

    def mixing(self, carry: Tensor) -> Tensor:
        """G `[T, L(L − 1)/2, BR, BR]` in the compute dtype (one element where there is a single level)."""
        br = power_of_two(self.rank)
        pairs = self.levels * (self.levels - 1) // 2
        if pairs == 0:
            return torch.empty(1, device=self.device, dtype=self.dtype)
        tile = min(64, br)
        mixing = torch.empty(len(self.gate), pairs, br, br, device=self.device, dtype=self.dtype)
        launch(
            gate_kernels.mixing_kernel,
            (pairs, len(self.gate), (br // tile) ** 2),
            tuple(self.down_weight),
            tuple(self.up_weight),
            carry,
            mixing,
            WIDTHS=self.structure.tower_widths,
            L=self.levels,
            R=self.rank,
            BLOCK_R=br,
            BLOCK_T=tile,
            ALIGNED=all(width % 16 == 0 for width in self.structure.tower_widths),
            BLOCK_D=64 if self.dtype != torch.float32 else 32,
            PRECISION=self.precision,
            num_warps=4,
        )
        return mixing


@dataclass
class Level:
    """What a run of the kernels takes besides its group: weights `[L, …]` per tower and the gates' values.

    For most networks it is all levels at once; with cross="side" one level at a time.
    """

    down_weight: Sequence[Tensor]
    down_bias: Sequence[Tensor]
    up_weight: Sequence[Tensor]
    up_bias: Sequence[Tensor]
    coef: Tensor
    carry: Tensor
    mixing: Tensor
    gelu: bool
    dtype: torch.dtype
    precision: str

    @classmethod
    def all(cls, p: Parameters) -> Level:
        coef, carry = p.coefficients()
        mixing = p.mixing(carry)
        weights = (p.down_weight, p.down_bias, p.up_weight, p.up_bias)
        return cls(*weights, coef, carry, mixing, p.gelu, p.dtype, p.precision)

    def one(self, level: int) -> Level:
        """This level alone; its h of before is a source like any other, so nothing is carried."""
        groups = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        down_weight, down_bias, up_weight, up_bias = (
            [t[level : level + 1] for t in group] for group in groups
        )
        coef = self.coef[:, level : level + 1].contiguous()
        carry = torch.ones_like(self.carry[:, :1])
        weights = (down_weight, down_bias, up_weight, up_bias)
        return Level(*weights, coef, carry, self.mixing, self.gelu, self.dtype, self.precision)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, r, K."""
        levels, rank = self.down_weight[0].shape[:2]
        return int(levels), int(rank), int(self.coef.shape[2])


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

    def rows(self) -> dict[str, Any]:
        stride = 0 if self.present is None else self.present.stride(0)
        return {"present": self.present, "present_stride": stride}
