"""Host side of the forward pass of one group of towers: buffers, config and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._autotune import tuned
from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import device_class, device_name, launch, multiprocessors
from crossan_fast.kernels.side_network import forward_kernels as kernels
from crossan_fast.kernels.side_network.parameters import Items, Parameters
from crossan_fast.kernels.side_network.plan import ForwardConfig, Group, Problem, forward_candidates


def problem_of(group: Group, p: Parameters, items: Items) -> Problem:
    """What the tables of configs are read with."""
    return Problem(
        device_class(p.device),
        multiprocessors(p.device),
        items.bucket,
        len(group.towers),
        p.levels,
        p.sources,
        group.width,
        p.rank,
        p.embedding,
        p.dtype,
        tuple(sorted({s.state.dtype.itemsize for s in group.slots})),
    )


def forward_group(group: Group, p: Parameters, items: Items, out: Tensor, saved: Tensor) -> None:
    """Fill the group's towers of `out` `[n, T, d]` and of `saved` `[T, n, L, r]`, a slice of all items'."""
    problem = problem_of(group, p, items)
    config = tuned(
        "side_network",
        (device_name(p.device), *problem, p.precision),
        forward_candidates(problem),
        lambda c: _forward_group(c, group, p, items, out, saved),
    )
    _forward_group(config, group, p, items, out, saved)


def _forward_group(
    config: ForwardConfig, group: Group, p: Parameters, items: Items, out: Tensor, saved: Tensor
) -> None:
    towers, n = len(group.towers), items.count
    common: dict[str, Any] = {
        "presence": items.presence,
        "N": n,
        "GROUP": group.constants,
        "SIZES": p.sizes(group.width),
        "BLOCK_R": p.block_r,
        "BLOCK_E": p.block_e,
        "PRECISION": p.precision,
        "num_stages": 1,
    }
    down: dict[str, Any] = {
        "read": group.read(items.ids),
        "gates": p.gates,
        "readers": (group.pick(p.down_weight), group.pick(p.head_weight)),
        "BLOCK_D": config.columns,
    }
    mixing, constants = p.mixing
    walk: dict[str, Any] = {
        "mixing": mixing,
        "constants": constants,
        "out": out,
        "saved": saved,
        "saved_items": saved.stride(0) // (p.levels * p.rank),
        "activations": torch.empty(towers, n, p.levels, p.block_r, device=p.device, dtype=p.dtype),
        "GELU": p.gelu,
    }
    blocks = cdiv(n, config.items)
    if config.fused:
        options: dict[str, Any] = {"BLOCK_N": config.items, "num_warps": config.warps}
        launch(kernels.fused_kernel, (towers, blocks), **common, **down, **walk, **options)
        return
    partial = torch.empty(config.splits, towers, n, p.row, **p.wide)
    for first in range(0, p.levels, config.levels):
        launch(
            kernels.down_kernel,
            (towers, blocks, config.splits),
            **common,
            **down,
            partial=partial,
            span=config.span,
            FIRST=first,
            COUNT=min(config.levels, p.levels - first),
            BLOCK_N=config.items,
            num_warps=config.warps,
        )
    launch(
        kernels.walk_kernel,
        (towers, cdiv(n, config.walk_items)),
        partial,
        **common,
        **walk,
        splits=config.splits,
        BLOCK_N=config.walk_items,
        num_warps=4,
    )
