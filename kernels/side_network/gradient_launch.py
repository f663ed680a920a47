"""Host side of the weight gradients of one group of towers: sums over chunks of items, then the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import tuned
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import device_name, launch, power_of_two
from crossan_fast.kernels.side_network import backward_kernels as kernels
from crossan_fast.kernels.side_network import finish_kernels
from crossan_fast.kernels.side_network import weight_gradient_kernels as sum_kernels
from crossan_fast.kernels.side_network.forward_launch import problem_of
from crossan_fast.kernels.side_network.parameters import Items, Level
from crossan_fast.kernels.side_network.plan import GradientConfig, Group, gradient_candidates


class GroupGradient:
    """Weight gradients of one group, added up over chunks of items, then finished."""

    def __init__(self, group: Group, level: Level, config: GradientConfig) -> None:
        self.towers, self.width, self.level, self.config = group.towers, group.width, level, config
        levels, rank, k = level.shape
        self.device = level.coef.device
        towers, br, splits = len(group.towers), power_of_two(rank), config.splits
        self.chunks = cdiv(group.width, config.columns)
        new: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        self.products = torch.empty(towers, group.width + levels * br, levels * br, **new)
        self.partial = torch.empty(splits, towers, levels, rank, group.width, **new)
        self.gate_partial = torch.empty(splits, self.chunks, towers, levels, k + 1, **new)
        self.sums = torch.empty(towers, group.width + levels * br, **new)
        self.started = False

    @classmethod
    def tuned(
        cls,
        group: Group,
        level: Level,
        items: Items,
        grad_outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> GroupGradient:
        """With the config for chunks like `items`: the table's, or the fastest where autotuning is on."""
        problem = problem_of(group, level, items)
        config = tuned(
            "side_network_backward",
            (device_name(level.coef.device), *problem),
            gradient_candidates(problem),
            lambda c: cls(group, level, c).add(group, items, grad_outputs, saved),
        )
        return cls(group, level, config)

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
        g = group.pick(grad_outputs)
        grad_z = torch.empty(towers, n, levels, br, device=self.device, dtype=level.dtype)
        activations = torch.empty_like(grad_z)
        self._walk(group, items, g, group.pick(saved), grad_z, activations)
        common: dict[str, Any] = {
            "grad_out": g,
            "grad_z": grad_z,
            "N": n,
            **items.rows(),
            **group.existence(),
            "ACCUMULATE": self.started,
            "L": levels,
            "D": self.width,
            "BLOCK_R": br,
            "PRECISION": level.precision,
        }
        rows = cdiv(self.width, config.up_columns) + cdiv(levels * br, config.up_columns)
        launch(
            sum_kernels.up_gradient_kernel,
            (towers, rows, levels + 1),
            activations=activations,
            products=self.products,
            sums=self.sums,
            BLOCK_N=config.up_items,
            BLOCK_D=config.up_columns,
            **common,
            num_warps=config.up_warps,
            num_stages=config.up_stages,
        )
        programs, tile = config.splits * self.chunks * towers, (config.items, config.columns)
        dx_rows = torch.empty(programs, levels, *tile, device=self.device, dtype=level.dtype)
        for first in range(0, levels, config.levels):
            launch(
                sum_kernels.down_gradient_kernel,
                (towers, self.chunks, config.splits),
                **group.tensors(),
                ids=items.ids,
                coef=level.coef,
                carry=level.carry,
                down_weight=group.pick(level.down_weight),
                up_bias=group.pick(level.up_bias),
                partial=self.partial,
                gate_partial=self.gate_partial,
                dx_rows=dx_rows,
                grad_x=None if grad_x is None else group.pick(grad_x),
                ITEMS=cdiv(cdiv(n, config.items), config.splits) * config.items,
                **group.constants(),
                FIRST=first,
                COUNT=min(config.levels, levels - first),
                R=rank,
                K=k,
                BLOCK_V=config.items * config.columns // (32 * config.warps),
                BLOCK_N=config.items,
                BLOCK_D=config.columns,
                **common,
                num_warps=config.warps,
                num_stages=1,
            )
        self.started = True

    def _walk(
        self,
        group: Group,
        items: Items,
        g: Sequence[Tensor],
        saved: Sequence[Tensor],
        grad_z: Tensor,
        activations: Tensor,
    ) -> None:
        """dz and a of a chunk."""
        level, walk = self.level, self.config.walk
        levels, rank, _ = level.shape
        towers, n, br = len(self.towers), items.count, power_of_two(rank)
        common: dict[str, Any] = {
            "grad_out": g,
            "up_weight": group.pick(level.up_weight),
            "N": n,
            **items.rows(),
            **group.existence(),
            "L": levels,
            "D": self.width,
            "R": rank,
            "BLOCK_R": br,
            "BLOCK_D": walk.columns,
            "PRECISION": level.precision,
            "num_stages": 1,
        }
        partial = None
        if not walk.fused:
            partial = torch.empty(walk.splits, towers, n, levels, br, device=self.device)
            for first in range(0, levels, walk.levels):
                launch(
                    kernels.grad_down_kernel,
                    (towers, cdiv(n, walk.items), walk.splits),
                    partial=partial,
                    span=walk.span,
                    FIRST=first,
                    COUNT=min(walk.levels, levels - first),
                    BLOCK_N=walk.items,
                    **common,
                    num_warps=walk.warps,
                )
        block = walk.items if walk.fused else walk.walk_items
        launch(
            kernels.grad_walk_kernel,
            (towers, cdiv(n, block)),
            partial=partial,
            mixing=level.mixing,
            carry=level.carry,
            saved=saved,
            grad_z=grad_z,
            activations=activations,
            splits=walk.splits,
            TOWERS=tuple(t.number for t in self.towers),
            BLOCK_N=block,
            GELU=level.gelu,
            **common,
            num_warps=walk.warps if walk.fused else 4,
        )

    def finish(
        self,
        down_weight: Sequence[Tensor],
        down_bias: Sequence[Tensor],
        up_weight: Sequence[Tensor],
        up_bias: Sequence[Tensor],
        gate_sum: Tensor,
    ) -> None:
        """Write the group's gradients (lists: one per tower of the network) and its rows of `gate_sum`."""
        if not self.started:
            raise RuntimeError("GroupGradient.finish: no items were added")
        level, splits = self.level, self.config.splits
        levels, rank, k = level.shape
        towers, br = len(self.towers), power_of_two(rank)
        pick = Group(self.towers).pick
        columns = min(self.config.combine_columns, power_of_two(self.width))
        chunks = cdiv(self.width, columns)
        gate_products = torch.empty(levels, chunks, towers, levels, device=self.device)
        common: dict[str, Any] = {
            "carry": level.carry,
            "down_weight": pick(level.down_weight),
            "TOWERS": tuple(t.number for t in self.towers),
            "L": levels,
            "D": self.width,
            "R": rank,
            "BLOCK_D": columns,
            "BLOCK_R": br,
        }
        launch(
            finish_kernels.combine_kernel,
            (towers, levels, chunks),
            self.products,
            self.partial,
            up_weight=pick(level.up_weight),
            down_grad=pick(down_weight),
            up_grad=pick(up_weight),
            gate_products=gate_products,
            splits=splits,
            DEPTH=self.config.combine_depth,
            # Operands are fp32 whatever the dtype; three tf32 products are as exact and use matrix units.
            PRECISION=level.precision if level.dtype == torch.float32 else "tf32x3",
            **common,
            num_warps=8,
            num_stages=self.config.combine_stages,
        )
        launch(
            finish_kernels.finish_kernel,
            (towers, chunks),
            self.sums,
            self.gate_partial,
            gate_products,
            down_bias_grad=pick(down_bias),
            up_bias_grad=pick(up_bias),
            gate_sum=gate_sum,
            parts=splits * self.chunks,
            product_parts=levels * chunks,
            K=k,
            BLOCK_G=power_of_two(levels * (k + 1)),
            BLOCK_P=32,
            **common,
            num_warps=4,
        )
