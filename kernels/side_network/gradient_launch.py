"""Host side of the weight gradients of one group of towers: sums over chunks of items, then the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import tuned
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import device_name, launch, power_of_two
from crossan_fast.kernels.side_network import backward_kernels, finish_kernels
from crossan_fast.kernels.side_network import weight_gradient_kernels as sum_kernels
from crossan_fast.kernels.side_network.forward_launch import problem_of
from crossan_fast.kernels.side_network.parameters import Items, Parameters
from crossan_fast.kernels.side_network.plan import GradientConfig, Group, gradient_candidates


class GroupGradient:
    """Weight gradients of one group, added up over chunks of items, then finished."""

    def __init__(self, group: Group, p: Parameters, config: GradientConfig) -> None:
        self.towers, self.width, self.p, self.config = group.towers, group.width, p, config
        towers, splits = len(group.towers), config.splits
        self.chunks = cdiv(group.width, config.columns)
        self.products = torch.empty(config.mixing_splits, towers, p.row, p.levels * p.block_r, **p.wide)
        self.sums = torch.empty(config.mixing_splits, towers, p.row, **p.wide)
        self.partial = torch.empty(splits, towers, p.levels * p.rank + p.embedding, group.width, **p.wide)
        self.gate_partial = torch.empty(splits, self.chunks, towers, p.levels, p.sources + 1, **p.wide)
        self.started = False

    @classmethod
    def tuned(
        cls, group: Group, p: Parameters, items: Items, grad_out: Tensor, saved: Tensor
    ) -> GroupGradient:
        """With the config for chunks like `items`: the table's, or the fastest where autotuning is on."""
        problem = problem_of(group, p, items)
        config = tuned(
            "side_network_backward",
            (device_name(p.device), *problem, p.precision),
            gradient_candidates(problem),
            lambda c: cls(group, p, c).add(group, items, grad_out, saved),
        )
        return cls(group, p, config)

    def add(
        self,
        group: Group,
        items: Items,
        grad_out: Tensor,
        saved: Tensor,
        grad_x: Sequence[Tensor] | None = None,
    ) -> None:
        """Add a chunk of items: `grad_out` `[n, T, d]` and `saved` `[T, n, L, r]`, a slice of all items'.

        `grad_x` (one `[n, L, D]` per tower of the network) receives dx.
        """
        p, config = self.p, self.config
        towers, n = len(self.towers), items.count
        new: dict[str, Any] = {"device": p.device, "dtype": p.dtype}
        grad_z = torch.empty(towers, n, p.row, **new)
        activations = torch.empty(towers, n, p.levels, p.block_r, **new)
        common: dict[str, Any] = {
            "grad_z": grad_z,
            "N": n,
            "BLOCK_R": p.block_r,
            "BLOCK_E": p.block_e,
            "PRECISION": p.precision,
        }
        launch(
            backward_kernels.grad_walk_kernel,
            (towers, cdiv(n, config.walk_items)),
            grad_out,
            items.presence,
            p.mixing[0],
            saved,
            activations=activations,
            saved_items=saved.stride(0) // (p.levels * p.rank),
            GROUP=group.constants,
            SIZES=p.sizes(self.width),
            BLOCK_N=config.walk_items,
            GELU=p.gelu,
            **common,
            num_warps=4,
            num_stages=1,
        )
        launch(
            sum_kernels.mixing_gradient_kernel,
            (towers, cdiv(p.row, config.mixing_rows), (p.levels + 1) * config.mixing_splits),
            activations=activations,
            products=self.products,
            sums=self.sums,
            ITEMS=_range(n, config.mixing_items, config.mixing_splits),
            ACCUMULATE=self.started,
            L=p.levels,
            BLOCK_N=config.mixing_items,
            BLOCK_X=config.mixing_rows,
            **common,
            num_warps=config.mixing_warps,
            num_stages=config.mixing_stages,
            maxnreg=config.mixing_registers,
        )
        self._down_gradient(group, items, grad_x, common)
        self.started = True

    def _down_gradient(
        self, group: Group, items: Items, grad_x: Sequence[Tensor] | None, common: dict[str, Any]
    ) -> None:
        """Products with u, and with states for the gates."""
        p, config = self.p, self.config
        towers, tile = len(self.towers), (config.items, config.columns)
        programs = config.splits * self.chunks * towers
        dx_rows = torch.empty(programs, p.levels, *tile, device=p.device, dtype=p.dtype)
        for first in range(0, p.levels, config.levels):
            launch(
                sum_kernels.down_gradient_kernel,
                (towers, self.chunks, config.splits),
                group.read(items.ids),
                items.presence,
                p.gates,
                (group.pick(p.down_weight), group.pick(p.head_weight)),
                shares=(self.partial, self.gate_partial),
                dx_rows=dx_rows,
                grad_x=None if grad_x is None else group.pick(grad_x),
                ITEMS=_range(items.count, config.items, config.splits),
                GROUP=group.constants,
                ACCUMULATE=self.started,
                FIRST=first,
                COUNT=min(config.levels, p.levels - first),
                SIZES=p.sizes(self.width),
                BLOCK_V=config.items * config.columns // (32 * config.warps),
                BLOCK_N=config.items,
                BLOCK_D=config.columns,
                **common,
                num_warps=config.warps,
                num_stages=1,
            )

    def finish(
        self,
        weight_grads: Sequence[Sequence[Tensor]],
        bias_grads: Sequence[Sequence[Tensor]],
        gate_sum: Tensor,
    ) -> None:
        """Write the group's gradients, of down, up and head (a tensor per tower of the network each), and its
        rows of `gate_sum`."""
        if not self.started:
            raise RuntimeError("GroupGradient.finish: no items were added")
        p, config, group = self.p, self.config, Group(self.towers)
        columns = min(config.combine_columns, power_of_two(self.width))
        chunks = cdiv(self.width, columns)
        gate_products = torch.empty(p.levels, chunks, len(self.towers), p.levels, **p.wide)
        launch(
            finish_kernels.combine_kernel,
            (len(self.towers), 2 * p.levels + 1, chunks),
            _sum(self.products),
            _sum(self.sums),
            self.partial,
            p.gates[1],
            tuple(group.pick(w) for w in (p.down_weight, p.up_weight, p.head_weight)),
            group.pick(p.up_bias),
            tuple(group.pick(g) for g in weight_grads),
            tuple(group.pick(g) for g in bias_grads),
            gate_products,
            config.splits,
            TOWERS=group.numbers,
            SIZES=p.sizes(self.width),
            BLOCK_D=columns,
            BLOCK_R=p.block_r,
            BLOCK_E=p.block_e,
            DEPTH=config.combine_depth,
            DEPTH_E=min(config.combine_depth, p.block_e),
            # Operands are fp32 whatever the dtype; three tf32 products are as exact and use matrix units. One
            # would round a sum over all items, under torch's switch as well.
            PRECISION="ieee" if (p.dtype, p.precision) == (torch.float32, "ieee") else "tf32x3",
            num_warps=8,
            num_stages=config.combine_stages,
        )
        launch(
            finish_kernels.gate_sums_kernel,
            (len(self.towers),),
            self.gate_partial,
            gate_products,
            gate_sum,
            config.splits * self.chunks,
            p.levels * chunks,
            TOWERS=group.numbers,
            L=p.levels,
            K=p.sources,
            BLOCK_G=power_of_two(p.levels * (p.sources + 1)),
            BLOCK_P=32,
            num_warps=4,
        )


def _range(count: int, block: int, splits: int) -> int:
    """Items of each of `splits` ranges, whole blocks."""
    return cdiv(cdiv(count, block), splits) * block


def _sum(shares: Tensor) -> Tensor:
    """Shares of ranges of items as one, in their order."""
    return shares[0] if shares.shape[0] == 1 else shares.sum(0)
