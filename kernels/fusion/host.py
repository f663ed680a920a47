"""fusion in Triton: one kernel forward; backward one over items, two over weights, one reduction.

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
_STATISTICS_BLOCK, _SUM_BLOCK = 64, 1024
# Items up to which launches cost more than what programs read in place of them.
_FEW = 4096


class Config(NamedTuple):
    """Items and inner units of a tile, warps and pipeline stages."""

    items: int
    units: int
    warps: int
    stages: int


def config(device: str, dtype: torch.dtype, tf32: bool, width: int, count: int) -> Config:
    """The default tile: few items per program fill a GPU at small counts, many spare L2 at large ones."""
    if dtype == torch.float32 and not tf32:
        return Config(16, 32, 8, 1)
    if width > 64 or dtype == torch.float32:
        return Config(16 if width > 128 else 32, 32, 4, 1)
    if device in BEFORE_HOPPER:
        return Config(32, 32, 8, 2)
    if count <= _FEW:
        return Config(32, 32, 4, 2)
    return Config(64, 32, 8, 2)


def candidates(device: str, dtype: torch.dtype, tf32: bool, width: int, count: int) -> list[Config]:
    """`config`'s choice, then what autotuning may try instead."""
    first = config(device, dtype, tf32, width, count)
    others = [first._replace(items=first.items // 2)] if first.items > 16 else []
    if width <= 64 and first.items < 64:
        others.append(first._replace(items=first.items * 2, warps=8))
    return [first, *others, first._replace(stages=1 if first.stages > 1 else 2)]


@dataclass(frozen=True)
class _Call:
    """What both directions are told of a call, as the op's schema has it."""

    embeddings: Tensor
    weights: FusionWeights
    present: Tensor | None
    top_k: int | None
    counts: Tensor | None
    dtype: torch.dtype

    def tile(self, direction: str, run: Callable[[Config], object]) -> Config:
        """The table's tile for this call, or the fastest where autotuning is on."""
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

    def __init__(self, call: _Call, tile: Config) -> None:
        modalities, inner, width = call.weights.w1.shape
        self.embeddings = call.embeddings.contiguous()
        self.count = self.embeddings.shape[0]
        # A program reads all weights once: converting them first pays where there are many programs.
        packed = uniform(call.weights, call.dtype if self.count > _FEW else None)
        self.router, self.experts = tuple(packed[:2]), tuple(packed[2:])
        self.present = None if call.present is None else call.present.contiguous().view(torch.uint8)
        self.counts = None if call.counts is None else call.counts.contiguous()
        self.padded = power_of_two(modalities)
        self.constants: dict[str, Any] = {
            "SIZES": (modalities, width, inner, call.top_k or 0),
            "BLOCKS": (tile.items, self.padded, power_of_two(width), tile.units),
            "DTYPE": _TYPES[call.dtype],
            "PRECISION": dot_precision(call.dtype),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


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
    return _forward(call.tile("forward", lambda tile: _forward(tile, call)), call)


def _forward(tile: Config, call: _Call) -> list[Tensor]:
    p, like = _Problem(call, tile), call.weights.w1
    modalities, _, width = like.shape
    items = like.new_empty((p.count, width), dtype=call.dtype)
    logits = like.new_empty((p.count, modalities), dtype=torch.float32)
    assigned, probability = (like.new_empty(modalities, dtype=torch.float32) for _ in range(2))
    programs = cdiv(p.count, tile.items)
    partial = like.new_empty((programs, 3, p.padded), dtype=torch.float32)
    with on_device(like):
        if programs:
            launch(
                forward_kernels.forward_kernel,
                (programs,),
                p.embeddings,
                p.router,
                p.experts,
                p.present,
                p.counts,
                logits,
                items,
                partial,
                p.count,
                **p.constants,
            )
        launch(
            forward_kernels.statistics_kernel,
            (1,),
            partial,
            assigned,
            probability,
            programs,
            M=modalities,
            BLOCK_M=p.padded,
            BLOCK=_STATISTICS_BLOCK,
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

    def run(tile: Config) -> list[Tensor]:
        return _backward(tile, call, *grads, logits.contiguous())

    return run(call.tile("backward", run))


def _backward(
    tile: Config, call: _Call, grad_items: Tensor, grad_probability: Tensor | None, logits: Tensor
) -> list[Tensor]:
    p, weights = _Problem(call, tile), call.weights
    grad_embeddings = torch.empty_like(p.embeddings)
    grad_logits = torch.empty_like(logits, dtype=call.dtype)
    with on_device(logits):
        launch(
            backward_kernels.items_kernel,
            (cdiv(p.count, tile.items),),
            grad_items,
            grad_probability,
            None if grad_probability is None else _total(p, call, logits),
            p.embeddings,
            logits,
            p.router[0],
            p.experts,
            p.present,
            p.counts,
            torch.empty_like(p.embeddings, dtype=torch.float32),
            grad_embeddings,
            grad_logits,
            p.count,
            **p.constants,
        )
        grads = _weight_gradients(p, tile, weights, grad_items, logits, grad_logits)
    return [grad_embeddings, *(grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))]


def _weight_gradients(
    p: _Problem,
    tile: Config,
    weights: FusionWeights,
    grad_items: Tensor,
    logits: Tensor,
    grad_logits: Tensor,
) -> list[Tensor]:
    """In the first weight's dtype."""
    modalities, inner, _ = weights.w1.shape
    grads = [
        torch.empty_like(w, dtype=weights[0].dtype, memory_format=torch.contiguous_format) for w in weights
    ]
    sizes = tuple(w.numel() for w in weights)
    starts = (0, *accumulate(sizes))
    unit_blocks = cdiv(inner, tile.units)
    # Twice as many parts of the items where there are enough of them to keep so many programs busy.
    crowd = modalities * unit_blocks * (1 if p.count > _FEW else 2)
    parts, length = split(crowd, cdiv(p.count, tile.items))
    partial = logits.new_empty((parts, starts[-1]))
    walk = (p.present, partial, p.count, length)
    launch(
        backward_kernels.router_kernel,
        (modalities, parts),
        grad_logits,
        p.embeddings,
        *walk,
        START=starts[0],
        SIZE=starts[-1],
        **p.constants,
    )
    launch(
        backward_kernels.experts_kernel,
        (unit_blocks, modalities, parts),
        grad_items,
        p.embeddings,
        logits,
        p.experts,
        *walk,
        START=starts[2],
        SIZE=starts[-1],
        **p.constants,
    )
    launch(
        backward_kernels.sum_kernel,
        (cdiv(max(sizes), _SUM_BLOCK), len(sizes)),
        partial,
        tuple(grads),
        parts,
        SIZE=starts[-1],
        STARTS=starts[:-1],
        SIZES=sizes,
        BLOCK=_SUM_BLOCK,
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
