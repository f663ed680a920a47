"""Host side of one group of towers: buffers, configs and launches, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels import side_network_backward as backward_kernels
from crossan_fast.kernels import side_network_forward as forward_kernels
from crossan_fast.kernels._autotune import tuned
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import (
    device_class,
    dot_precision,
    launch,
    multiprocessors,
    power_of_two,
    uniform,
)
from crossan_fast.kernels.side_network_plan import (
    ForwardConfig,
    GradientConfig,
    Group,
    forward_candidates,
    forward_config,
    gradient_config,
)
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights


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
            "BL": power_of_two(self.levels),
        }

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """coef `[T, L, K]` and carry `[T, L]`, fp32."""
        towers = len(self.gate)
        coef = torch.empty(towers, self.levels, self.sources, device=self.device)
        carry = torch.empty(towers, self.levels, device=self.device)
        launch(
            forward_kernels.coefficients_kernel,
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
            backward_kernels.gate_gradient_kernel,
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
            forward_kernels.mixing_kernel,
            (pairs, len(self.gate), (br // tile) ** 2),
            tuple(self.down_weight),
            tuple(self.up_weight),
            carry,
            mixing,
            WIDTHS=self.structure.tower_widths,
            L=self.levels,
            R=self.rank,
            BR=br,
            BT=tile,
            ALIGNED=all(width % 16 == 0 for width in self.structure.tower_widths),
            BD=64 if self.dtype != torch.float32 else 32,
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

    def rows(self) -> dict[str, Any]:
        stride = 0 if self.present is None else self.present.stride(0)
        return {"present": self.present, "present_stride": stride}


def forward_group(
    group: Group, level: Level, items: Items, outputs: Sequence[Tensor], saved: Sequence[Tensor]
) -> None:
    """Fill the group's `outputs` `[n, D]` and `saved` `[n, L, r]` (both one per tower of the network)."""
    levels, rank, k = level.shape
    towers, n, device = len(group.towers), items.count, outputs[0].device
    choices = forward_candidates(
        device_class(device), n, towers, levels, group.width, rank, level.dtype, multiprocessors(device)
    )
    stored = tuple(str(s.state.dtype) for s in group.slots)
    size = 1 << (n - 1).bit_length()
    key = (device_class(device), towers, levels, k, group.width, rank, str(level.dtype), *stored, size)
    config = tuned(
        "side_network", key, choices, lambda c: _forward_group(c, group, level, items, outputs, saved)
    )
    _forward_group(config, group, level, items, outputs, saved)


def _forward_group(
    config: ForwardConfig,
    group: Group,
    level: Level,
    items: Items,
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    levels, rank, k = level.shape
    towers, n, br = len(group.towers), items.count, power_of_two(rank)
    device = outputs[0].device
    sizes = {"L": levels, "R": rank, "BR": br, "PRECISION": level.precision}
    read = {**group.tensors(), **items.rows(), "ids": items.ids, "coef": level.coef, "carry": level.carry}
    down = {"down_weight": group.pick(level.down_weight), "up_bias": group.pick(level.up_bias)}
    walk = {"mixing": level.mixing, "down_bias": group.pick(level.down_bias), "saved": group.pick(saved)}
    up_weight, out = group.pick(level.up_weight), group.pick(outputs)
    towers_of = {"TOWERS": group.constants()["TOWERS"]}
    blocks = cdiv(n, config.items)
    if config.fused:
        launch(
            forward_kernels.fused_kernel,
            (towers, blocks),
            **read,
            **down,
            **walk,
            up_weight=up_weight,
            out=out,
            N=n,
            **group.constants(),
            **group.existence(),
            **sizes,
            D=group.width,
            K=k,
            BN=config.items,
            BD=config.columns,
            BU=config.up_columns,
            GELU=level.gelu,
            num_warps=config.warps,
            num_stages=1,
        )
        return
    partial = torch.empty(config.splits, towers, n, levels, br, device=device)
    activations = torch.empty(towers, n, levels, br, device=device, dtype=level.dtype)
    for first in range(0, levels, config.levels):
        launch(
            forward_kernels.down_kernel,
            (towers, blocks, config.splits),
            **read,
            **down,
            out=out,
            partial=partial,
            N=n,
            **group.constants(),
            **sizes,
            FIRST=first,
            COUNT=min(config.levels, levels - first),
            D=group.width,
            K=k,
            BN=config.items,
            BD=config.columns,
            SPAN=config.span,
            num_warps=config.warps,
            num_stages=1,
        )
    launch(
        forward_kernels.walk_kernel,
        (towers, cdiv(n, config.walk_items)),
        partial,
        activations=activations,
        **walk,
        **items.rows(),
        N=n,
        **towers_of,
        **group.existence(),
        **sizes,
        SPLITS=config.splits,
        BN=config.walk_items,
        GELU=level.gelu,
        num_warps=config.warps,
        num_stages=1,
    )
    launch(
        forward_kernels.up_kernel,
        (towers, blocks, cdiv(group.width, config.up_columns)),
        activations,
        level.carry,
        up_weight,
        out,
        **items.rows(),
        N=n,
        **towers_of,
        **group.existence(),
        **sizes,
        D=group.width,
        BN=config.items,
        BD=config.up_columns,
        num_warps=4,
        num_stages=3,
    )


class GroupGradient:
    """Weight gradients of one group, added up over chunks of items, then finished."""

    def __init__(self, group: Group, level: Level, count: int) -> None:
        self.towers, self.width, self.level = group.towers, group.width, level
        levels, rank, k = level.shape
        self.device = level.coef.device
        towers = len(group.towers)
        sizes = (towers, levels, group.width, rank, level.dtype, multiprocessors(self.device))
        kind = device_class(self.device)
        self.walk: ForwardConfig = forward_config(kind, count, *sizes)
        self.config: GradientConfig = gradient_config(kind, count, *sizes)
        self.chunks = cdiv(group.width, self.config.columns)
        splits = self.config.splits
        new: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        self.partial = torch.empty(splits, towers, 2, levels * rank * group.width, **new)
        self.gate_partial = torch.empty(splits, self.chunks, towers, levels, k + 1, **new)
        self.sum_partial = torch.empty(splits, towers, group.width, **new)
        self.z_sum: Tensor | None = None

    def add(
        self,
        group: Group,
        items: Items,
        grad_outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        grad_x: Sequence[Tensor] | None = None,
    ) -> None:
        """Add a chunk of items; `grad_x` (one `[n, L, D]` per tower of the network) receives dx."""
        level, config = self.level, self.config
        levels, rank, k = level.shape
        towers, n, br = len(self.towers), items.count, power_of_two(rank)
        sizes = {"L": levels, "R": rank, "BR": br, "D": self.width, "PRECISION": level.precision}
        towers_of = {"TOWERS": tuple(t.number for t in self.towers)}
        g, up_weight = group.pick(grad_outputs), group.pick(level.up_weight)
        grad_z = torch.empty(towers, n, levels, br, device=self.device, dtype=level.dtype)
        activations = torch.empty_like(grad_z)
        partial, splits = None, 0
        if not self.walk.fused:
            splits = self.walk.splits
            partial = torch.empty(splits, towers, n, levels, br, device=self.device)
            for first in range(0, levels, self.walk.levels):
                launch(
                    backward_kernels.grad_down_kernel,
                    (towers, cdiv(n, self.walk.items), splits),
                    g,
                    up_weight,
                    **items.rows(),
                    partial=partial,
                    N=n,
                    **group.existence(),
                    **sizes,
                    FIRST=first,
                    COUNT=min(self.walk.levels, levels - first),
                    BN=self.walk.items,
                    BD=self.walk.columns,
                    SPAN=self.walk.span,
                    num_warps=self.walk.warps,
                    num_stages=1,
                )
        block = self.walk.walk_items if splits else self.walk.items
        launch(
            backward_kernels.grad_walk_kernel,
            (towers, cdiv(n, block)),
            g,
            up_weight,
            partial,
            level.mixing,
            level.carry,
            group.pick(saved),
            grad_z,
            activations,
            **items.rows(),
            N=n,
            **towers_of,
            **group.existence(),
            **sizes,
            SPLITS=splits,
            BN=block,
            BD=self.walk.columns,
            GELU=level.gelu,
            num_warps=self.walk.warps,
            num_stages=1,
        )
        share = {
            "carry": level.carry,
            "down_weight": group.pick(level.down_weight),
            "grad_out": g,
            "grad_z": grad_z,
            "activations": activations,
            "partial": self.partial,
            "N": n,
            "ITEMS": cdiv(cdiv(n, config.up_items), config.splits) * config.up_items,
            **group.existence(),
            **items.rows(),
            "ACCUMULATE": self.z_sum is not None,
            "num_warps": config.warps,
            "num_stages": 1,
            **sizes,
        }
        for first in range(0, levels, config.up_levels):
            launch(
                backward_kernels.up_gradient_kernel,
                (towers, cdiv(self.width, config.up_columns), config.splits),
                sum_partial=self.sum_partial,
                grad_x=None if grad_x is None else group.pick(grad_x),
                FIRST=first,
                COUNT=min(config.up_levels, levels - first),
                BN=config.up_items,
                BD=config.up_columns,
                **towers_of,
                **share,
            )
        programs, rows = config.splits * self.chunks * towers, config.items
        dx_rows = torch.empty(programs, levels, rows, config.columns, device=self.device, dtype=level.dtype)
        gate_rows = torch.empty(programs, levels * (k + 1), rows, device=self.device)
        for first in range(0, levels, config.levels):
            launch(
                backward_kernels.down_gradient_kernel,
                (towers, self.chunks, config.splits),
                **group.tensors(),
                ids=items.ids,
                coef=level.coef,
                up_weight=up_weight,
                up_bias=group.pick(level.up_bias),
                dx_rows=dx_rows,
                gate_rows=gate_rows,
                gate_partial=self.gate_partial,
                **group.constants(),
                FIRST=first,
                COUNT=min(config.levels, levels - first),
                K=k,
                BN=config.items,
                BD=config.columns,
                **share,
            )
        z_sum = grad_z.sum(1, dtype=torch.float32)
        self.z_sum = z_sum if self.z_sum is None else self.z_sum + z_sum

    def finish(
        self,
        down_weight: Sequence[Tensor],
        down_bias: Sequence[Tensor],
        up_weight: Sequence[Tensor],
        up_bias: Sequence[Tensor],
        gate_sum: Tensor,
    ) -> None:
        """Write the group's gradients (lists: one per tower of the network) and its rows of `gate_sum`."""
        if self.z_sum is None:
            raise RuntimeError("GroupGradient.finish: no items were added")
        levels, rank, k = self.level.shape
        towers, splits, br = len(self.towers), self.config.splits, power_of_two(rank)
        pick = Group(self.towers).pick
        size, block = levels * rank * self.width, 1024
        launch(
            backward_kernels.reduce_kernel,
            (towers, 2, cdiv(size, block)),
            self.partial,
            pick(down_weight),
            pick(up_weight),
            size,
            SPLITS=splits,
            BLOCK=block,
            num_warps=4,
        )
        columns = min(64, power_of_two(self.width))
        launch(
            backward_kernels.finish_kernel,
            (towers, cdiv(self.width, columns)),
            self.sum_partial,
            self.gate_partial,
            self.z_sum,
            self.level.carry,
            pick(self.level.down_weight),
            pick(down_bias),
            pick(up_bias),
            gate_sum,
            SPLITS=splits,
            PARTS=splits * self.chunks,
            TOWERS=tuple(t.number for t in self.towers),
            L=levels,
            D=self.width,
            R=rank,
            K=k,
            BD=columns,
            BR=br,
            BG=power_of_two(levels * (k + 1)),
            num_warps=4,
        )
