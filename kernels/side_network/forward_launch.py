"""Host side of the forward pass of one group of towers: buffers, config and launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import tuned
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import device_class, device_name, launch, multiprocessors, power_of_two
from crossan_fast.kernels.side_network import forward_kernels as kernels
from crossan_fast.kernels.side_network import fused_kernels
from crossan_fast.kernels.side_network.parameters import Items, Level
from crossan_fast.kernels.side_network.plan import ForwardConfig, Group, Problem, forward_candidates


def problem_of(group: Group, level: Level, items: Items) -> Problem:
    """What the tables of configs are read with."""
    levels, rank, sources = level.shape
    device = level.coef.device
    return Problem(
        device_class(device),
        multiprocessors(device),
        items.bucket,
        len(group.towers),
        levels,
        sources,
        group.width,
        rank,
        level.dtype,
        tuple(sorted({s.state.dtype.itemsize for s in group.slots})),
    )


def forward_group(
    group: Group, level: Level, items: Items, outputs: Sequence[Tensor], saved: Sequence[Tensor]
) -> None:
    """Fill the group's `outputs` `[n, D]` and `saved` `[n, L, r]` (both one per tower of the network)."""
    problem = problem_of(group, level, items)
    config = tuned(
        "side_network",
        (device_name(level.coef.device), *problem),
        forward_candidates(problem),
        lambda c: _forward_group(c, group, level, items, outputs, saved),
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
    sizes = {"L": levels, "R": rank, "BLOCK_R": br, "PRECISION": level.precision, "N": n}
    read = {**group.tensors(), **items.rows(), "ids": items.ids, "coef": level.coef, "carry": level.carry}
    down = {"down_weight": group.pick(level.down_weight), "up_bias": group.pick(level.up_bias)}
    walk = {"mixing": level.mixing, "down_bias": group.pick(level.down_bias), "saved": group.pick(saved)}
    activations = torch.empty(towers, n, levels, br, device=device, dtype=level.dtype)
    up = {"up_weight": group.pick(level.up_weight), "activations": activations}
    out = group.pick(outputs)
    towers_of = {"TOWERS": group.constants()["TOWERS"]}
    blocks = cdiv(n, config.items)
    if config.fused:
        launch(
            fused_kernels.fused_kernel,
            (towers, blocks),
            **read,
            **down,
            **walk,
            **up,
            out=out,
            **group.constants(),
            **group.existence(),
            **sizes,
            D=group.width,
            K=k,
            BLOCK_N=config.items,
            BLOCK_D=config.columns,
            BLOCK_U=config.up_columns,
            GELU=level.gelu,
            num_warps=config.warps,
            num_stages=1,
        )
        return
    partial = torch.empty(config.splits, towers, n, levels, br, device=device)
    for first in range(0, levels, config.levels):
        launch(
            kernels.down_kernel,
            (towers, blocks, config.splits),
            **read,
            **down,
            out=out,
            partial=partial,
            span=config.span,
            **group.constants(),
            **sizes,
            FIRST=first,
            COUNT=min(config.levels, levels - first),
            D=group.width,
            K=k,
            BLOCK_N=config.items,
            BLOCK_D=config.columns,
            num_warps=config.warps,
            num_stages=1,
        )
    launch(
        kernels.walk_kernel,
        (towers, cdiv(n, config.walk_items)),
        partial,
        **walk,
        activations=activations,
        **items.rows(),
        splits=config.splits,
        **towers_of,
        **group.existence(),
        **sizes,
        BLOCK_N=config.walk_items,
        GELU=level.gelu,
        num_warps=4,
        num_stages=1,
    )
    launch(
        kernels.up_kernel,
        (towers, blocks, cdiv(group.width, config.up_columns)),
        **up,
        carry=level.carry,
        out=out,
        **items.rows(),
        **towers_of,
        **group.existence(),
        **sizes,
        D=group.width,
        BLOCK_N=config.items,
        BLOCK_D=config.up_columns,
        num_warps=4,
        num_stages=1,
    )
