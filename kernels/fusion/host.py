"""fusion in Triton: forward experts and their sum; backward experts, router, experts' weights and a sum.

Kernels are in `forward_kernels` and `backward_kernels`, which say what each keeps on chip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._autotune import bucket, tuned
from crossan_fast.kernels._blocks import cdiv, on_device, split
from crossan_fast.kernels._common import (
    BEFORE_HOPPER,
    device_class,
    device_name,
    dot_precision,
    launch,
    power_of_two,
    uniform,
)
from crossan_fast.kernels.fusion import backward_kernels, forward_kernels
from crossan_fast.ops._contracts import FusionWeights

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Tiles of what adds up: programs' statistics, items of the experts' sum, parts and numbers of a gradient.
_STATISTICS_BLOCK, _ITEMS_BLOCK, _SUM_BLOCK = 64, 16, (8, 512)
_ROUTER_WARPS = 4
# Items up to which launches cost more than what programs read in place of them, and programs of all experts
# would leave most of a GPU idle.
_FEW = 4096


class Tile(NamedTuple):
    """Items and inner units of a program's step, its warps and pipeline stages."""

    items: int
    units: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Tiles of the kernels that own items and of those that own expert weights."""

    items: Tile
    weights: Tile
    # A program takes one expert of its items, not all in turn.
    apart: bool


def config(device: str, dtype: torch.dtype, tf32: bool, width: int, count: int) -> Config:
    """The default tiles: few items per program fill a GPU at small counts, many spare L2 at large ones."""
    few = count <= _FEW
    if dtype == torch.float32 and not tf32:
        tile = Tile(16, 32, 8, 1)
        return Config(tile, tile, few)
    if width > 64 or dtype == torch.float32:
        # Tiles of 32 items spill: of width 64 in experts' weights alone, of a greater one everywhere.
        narrow = Tile(16, 32, 8 if width > 128 else 4, 1)
        return Config(narrow if few or width > 64 else narrow._replace(items=32), narrow, few)
    if device in BEFORE_HOPPER:
        tile = Tile(32, 32, 8, 2)
    else:
        tile = Tile(32, 32, 4, 2) if few else Tile(64, 32, 8, 2)
    return Config(Tile(16, 128, 8, 1) if few else tile, tile, few)


def candidates(device: str, dtype: torch.dtype, tf32: bool, width: int, count: int) -> list[Config]:
    """`config`'s choice, then what autotuning may try instead."""
    first = config(device, dtype, tf32, width, count)
    items, weights = first.items, first.weights
    others = [
        first._replace(apart=not first.apart),
        first._replace(items=items._replace(stages=3 - items.stages)),
        first._replace(weights=weights._replace(stages=3 - weights.stages)),
    ]
    if items.units > 32:
        others.append(first._replace(items=items._replace(units=items.units // 2, warps=4)))
    if width <= 64 and items.items < 64:
        others.append(first._replace(items=items._replace(items=items.items * 2, warps=8)))
    return [first, *others]


@dataclass(frozen=True)
class _Call:
    """What both directions are told of a call, as the op's schema has it."""

    embeddings: Tensor
    weights: FusionWeights
    present: Tensor | None
    top_k: int | None
    counts: Tensor | None
    dtype: torch.dtype

    def choose(self, direction: str, run: Callable[[Config], object]) -> Config:
        """The table's config for this call, or the fastest where autotuning is on."""
        device, count, (modalities, inner, width) = (
            self.embeddings.device,
            self.embeddings.shape[0],
            self.weights.w1.shape,
        )
        precision = dot_precision(self.dtype)
        options = (self.top_k, self.present is None, self.counts is None, self.dtype, self.weights.w1.dtype)
        key = (device_name(device), modalities, inner, width, *options, precision)
        choices = candidates(device_class(device), self.dtype, precision == "tf32", width, count)
        return tuned(f"fusion_{direction}", (*key, bucket(count)), choices, run)


class _Problem:
    """What every launch of a call is told: contiguous inputs and constants."""

    def __init__(self, call: _Call, chosen: Config) -> None:
        modalities, inner, width = call.weights.w1.shape
        self.embeddings = call.embeddings.contiguous()
        self.count = self.embeddings.shape[0]
        # A program reads its experts' weights once: converting them first pays where there are many programs.
        packed = uniform(call.weights, call.dtype if self.count > _FEW else None)
        self.router, self.experts = tuple(packed[:2]), tuple(packed[2:])
        self.present = None if call.present is None else call.present.contiguous().view(torch.uint8)
        self.counts = None if call.counts is None else call.counts.contiguous()
        self.padded, self.width = power_of_two(modalities), power_of_two(width)
        self.blocks = cdiv(self.count, chosen.items.items)
        self.grid = (self.blocks, modalities if chosen.apart else 1)
        self.unit_blocks = cdiv(inner, chosen.weights.units)

        def constants(tile: Tile) -> dict[str, Any]:
            experts = 1 if chosen.apart else modalities
            return {
                "SIZES": (modalities, width, inner, call.top_k or 0),
                "BLOCKS": (tile.items, self.padded, self.width, tile.units, experts),
                "DTYPE": _TYPES[call.dtype],
                "PRECISION": dot_precision(call.dtype),
                "num_warps": tile.warps,
                "num_stages": tile.stages,
            }

        self.over_items, self.over_weights = constants(chosen.items), constants(chosen.weights)


def forward(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Arguments as in the op's schema; see `fusion_reference`.

    Returns:
        items `[N, d]` in `dtype`; shares of assignments `[M]` and mean router probabilities `[M]`, fp32; for
        the backward the router's logits `[N, M]` in fp32.
    """
    call = _Call(embeddings, FusionWeights(*weights), present, top_k, counts, dtype)
    return _forward(call.choose("forward", lambda config: _forward(config, call)), call)


def _forward(chosen: Config, call: _Call) -> list[Tensor]:
    p, like = _Problem(call, chosen), call.weights.w1
    modalities, _, width = like.shape
    items = like.new_empty((p.count, width), dtype=call.dtype)
    logits = like.new_empty((p.count, modalities), dtype=torch.float32)
    assigned, probability = (like.new_empty(modalities, dtype=torch.float32) for _ in range(2))
    partial = like.new_empty((p.blocks, 3, p.padded), dtype=torch.float32)
    parts = torch.empty_like(p.embeddings, dtype=torch.float32) if p.grid[1] > 1 else None
    with on_device(like):
        if p.count:
            launch(
                forward_kernels.forward_kernel,
                p.grid,
                p.embeddings,
                p.router,
                p.experts,
                p.present,
                p.counts,
                logits,
                items if parts is None else parts,
                partial,
                p.count,
                **p.over_items,
            )
        launch(
            forward_kernels.finish_kernel,
            (1 if parts is None else 1 + cdiv(p.count, _ITEMS_BLOCK),),
            partial,
            assigned,
            probability,
            p.blocks,
            parts,
            items,
            p.count,
            M=modalities,
            D=width,
            BLOCK_M=p.padded,
            BLOCK_P=_STATISTICS_BLOCK,
            BLOCK_N=_ITEMS_BLOCK,
            BLOCK_D=p.width,
        )
    return [items, assigned, probability, logits]


def backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of `embeddings`, then of `weights`, each in its tensor's own dtype.

    An empty `grad_probability`: the load-balance loss has no part in the gradient.
    """
    if embeddings.shape[0] == 0:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (embeddings, *weights)]
    call = _Call(embeddings, FusionWeights(*weights), present, top_k, counts, dtype)
    balanced = grad_probability.contiguous() if grad_probability.numel() else None
    grads = (grad_items.contiguous(), balanced)

    def run(config: Config) -> list[Tensor]:
        return _backward(config, call, *grads, logits.contiguous())

    return run(call.choose("backward", run))


def _backward(
    chosen: Config, call: _Call, grad_items: Tensor, grad_probability: Tensor | None, logits: Tensor
) -> list[Tensor]:
    p, weights, modalities = _Problem(call, chosen), call.weights, logits.shape[1]
    grad_through = torch.empty_like(p.embeddings, dtype=torch.float32)
    grad_shares, grad_embeddings = torch.empty_like(logits), torch.empty_like(p.embeddings)
    sizes = [w.numel() for w in weights]
    router_parts, router_length = split(modalities, p.blocks)
    of_router = logits.new_empty((router_parts, sum(sizes[:2])))
    parts, length = split(modalities * p.unit_blocks, cdiv(p.count, chosen.weights.items))
    of_experts = logits.new_empty((parts, sum(sizes[2:])))
    with on_device(logits):
        launch(
            backward_kernels.items_kernel,
            p.grid,
            grad_items,
            p.embeddings,
            logits,
            p.experts,
            p.present,
            grad_through,
            grad_shares,
            p.count,
            **p.over_items,
        )
        launch(
            backward_kernels.router_kernel,
            (modalities, router_parts),
            grad_through,
            grad_shares,
            grad_probability,
            None if grad_probability is None else _total(p, call, logits),
            p.embeddings,
            logits,
            p.router[0],
            p.present,
            p.counts,
            grad_embeddings,
            of_router,
            p.count,
            router_length,
            **{**p.over_items, "num_warps": _ROUTER_WARPS},
        )
        launch(
            backward_kernels.experts_kernel,
            (p.unit_blocks, modalities, parts),
            grad_items,
            p.embeddings,
            logits,
            p.experts,
            p.present,
            of_experts,
            p.count,
            length,
            **p.over_weights,
        )
        grads = _sum(of_router, of_experts, weights, sizes)
    return [grad_embeddings, *(grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))]


def _sum(of_router: Tensor, of_experts: Tensor, weights: FusionWeights, sizes: list[int]) -> list[Tensor]:
    """The weights' gradients from their parts, in the weights' dtype, or fp32 where they differ."""
    kinds = {w.dtype for w in weights}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    grads = [torch.empty_like(w, dtype=kind, memory_format=torch.contiguous_format) for w in weights]
    launch(
        backward_kernels.sum_kernel,
        (cdiv(max(sizes), _SUM_BLOCK[1]), len(sizes)),
        of_router,
        of_experts,
        tuple(grads),
        len(of_router),
        len(of_experts),
        SIZES=tuple(sizes),
        STARTS=(*accumulate([0, *sizes[:1]]), *accumulate([0, *sizes[2:-1]])),
        ROUTER=of_router.shape[1],
        EXPERTS=of_experts.shape[1],
        BLOCK_P=_SUM_BLOCK[0],
        BLOCK=_SUM_BLOCK[1],
    )
    return grads


def _total(p: _Problem, call: _Call, like: Tensor) -> Tensor | None:
    """What all items count together in the load-balance statistics, as a tensor: nothing waits for it.

    None where the items are so few that each program adds them up itself, in place of three launches.
    """
    if p.count <= _FEW:
        return None
    if call.present is None:
        total = torch.full((), p.count, device=like.device) if call.counts is None else call.counts.sum()
    else:
        exists = call.present.any(dim=1)
        total = exists.sum() if call.counts is None else (exists * call.counts).sum()
    return total.to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
