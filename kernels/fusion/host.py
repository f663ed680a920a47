"""fusion in Triton: one kernel forward; backward one over items, three over weights, one reduction.

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


class Config(NamedTuple):
    """Items, head columns and inner units of a tile, warps and pipeline stages."""

    items: int
    columns: int
    units: int
    warps: int
    stages: int


def config(device: str, dtype: torch.dtype, tf32: bool, width: int, count: int, backward: bool) -> Config:
    """The default tile: few items per program fill a GPU at small counts, many spare L2 at large ones."""
    if dtype == torch.float32 and not tf32:
        return Config(16, 32, 32, 8, 1)
    if width > 64 or dtype == torch.float32:
        return Config(16 if width > 128 else 32, 32, 32, 4, 1)
    if device in BEFORE_HOPPER:
        return Config(32, 64, 32, 8, 2)
    if count <= 4096:
        return Config(32, 64, 32, 4, 2)
    # With 64 columns items_kernel spills 8 bytes where heads are 1,024 wide or more.
    return Config(64, 32 if backward else 64, 32, 8, 2)


def candidates(
    device: str, dtype: torch.dtype, tf32: bool, width: int, count: int, backward: bool
) -> list[Config]:
    """`config`'s choice, then what autotuning may try instead."""
    first = config(device, dtype, tf32, width, count, backward)
    others = [first._replace(items=first.items // 2)] if first.items > 16 else []
    if width <= 64 and first.items < 64:
        others.append(first._replace(items=first.items * 2, warps=8))
    return [first, *others, first._replace(stages=1 if first.stages > 1 else 2)]


@dataclass(frozen=True)
class _Problem:
    """What every launch is told: contiguous inputs, sizes and constants."""

    hidden: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]  # router_weight, router_bias, w1, b1, w2, b2
    present: Tensor | None
    counts: Tensor | None
    tile: Config
    sizes: dict[str, Any]

    @property
    def count(self) -> int:
        return self.hidden[0].shape[0]

    def constants(self, *names: str) -> dict[str, Any]:
        launch_options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        return {name: self.sizes[name] for name in names} | launch_options


def _problem(
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
    tile: Config,
) -> _Problem:
    modalities, inner, width = weights.w1.shape
    precision = dot_precision(dtype)
    everything = [*weights.head_weight, *weights.head_bias, *weights[2:]]
    # A program reads all weights once: converting them first pays where there are many programs.
    packed = uniform(everything, dtype if hidden[0].shape[0] > 4096 else None)
    sizes: dict[str, Any] = {
        "WIDTHS": tuple(h.shape[1] for h in hidden),
        "M": modalities,
        "D": width,
        "F": inner,
        "TOP_K": top_k or 0,
        "HAS_PRESENT": present is not None,
        "HAS_COUNTS": counts is not None,
        "DTYPE": _TYPES[dtype],
        "BLOCK_N": tile.items,
        "BLOCK_K": tile.columns,
        "BLOCK_F": tile.units,
        "BLOCK_D": power_of_two(width),
        "BLOCK_M": power_of_two(modalities),
        "PRECISION": precision,
    }
    return _Problem(
        tuple(uniform(hidden)),
        tuple(packed[:modalities]),
        tuple(packed[modalities : 2 * modalities]),
        tuple(packed[2 * modalities :]),
        None if present is None else present.contiguous().view(torch.uint8),
        None if counts is None else counts.contiguous(),
        tile,
        sizes,
    )


def _tile(
    direction: str,
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
    run: Callable[[Config], object],
) -> Config:
    """The table's tile for this call, or the fastest where autotuning is on."""
    device, count, (modalities, inner, width) = hidden[0].device, hidden[0].shape[0], weights.w1.shape
    options = (top_k, present is None, counts is None, dtype, weights.w1.dtype, dot_precision(dtype))
    key = (device_name(device), modalities, inner, width, *(h.shape[1] for h in hidden), *options)
    tf32 = dot_precision(dtype) == "tf32"
    choices = candidates(device_class(device), dtype, tf32, width, count, direction == "backward")
    return tuned(f"fusion_{direction}", (*key, bucket(count)), choices, run)


def forward(
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Arguments as in the op's schema; see `fusion_reference`.

    Returns:
        items `[N, d]` in `dtype`; shares of assignments `[M]` and mean router probabilities `[M]`, fp32; for
        the backward e `[N, M·d]` in `dtype` and the router's logits `[N, M]` in fp32.
    """
    inputs = (hidden, FusionWeights.unflatten(weights), present, top_k, counts, dtype)
    return _forward(_tile("forward", *inputs, lambda tile: _forward(tile, *inputs)), *inputs)


def _forward(
    tile: Config,
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    p = _problem(hidden, weights, present, top_k, counts, dtype, tile)
    count, (modalities, _, width) = p.count, weights.w1.shape
    like = weights.w1
    items = like.new_empty((count, width), dtype=dtype)
    saved = [
        like.new_empty((count, modalities * width), dtype=dtype),
        like.new_empty((count, modalities), dtype=torch.float32),
    ]
    assigned, probability = (like.new_empty(modalities, dtype=torch.float32) for _ in range(2))
    programs = cdiv(count, p.tile.items)
    padded = p.sizes["BLOCK_M"]
    partial = like.new_empty((programs, 3, padded), dtype=torch.float32)
    with on_device(like):
        if programs:
            names = "WIDTHS M D F TOP_K HAS_PRESENT HAS_COUNTS DTYPE BLOCK_N BLOCK_K BLOCK_F BLOCK_D BLOCK_M"
            launch(
                forward_kernels.forward_kernel,
                (programs,),
                p.hidden,
                p.heads,
                p.biases,
                *p.rest,
                p.present,
                p.counts,
                *saved,
                items,
                partial,
                count,
                **p.constants(*names.split(), "PRECISION"),
            )
        launch(
            forward_kernels.statistics_kernel,
            (1,),
            partial,
            assigned,
            probability,
            programs,
            M=modalities,
            BLOCK_M=padded,
            BLOCK=_STATISTICS_BLOCK,
        )
    return [items, assigned, probability, *saved]


def backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    saved: Sequence[Tensor],
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of `hidden`, then of `weights`, each in its tensor's own dtype."""
    if hidden[0].shape[0] == 0:
        return [torch.zeros_like(tensor) for tensor in (*hidden, *weights)]
    inputs = (hidden, FusionWeights.unflatten(weights), present, top_k, counts, dtype)

    def run(tile: Config) -> list[Tensor]:
        return _backward(tile, grad_items, grad_probability, saved, *inputs)

    return run(_tile("backward", *inputs, run))


def _backward(
    tile: Config,
    grad_items: Tensor,
    grad_probability: Tensor,
    saved: Sequence[Tensor],
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    p = _problem(hidden, weights, present, top_k, counts, dtype, tile)
    count, (modalities, inner, _) = p.count, weights.w1.shape
    flat = weights.flatten()
    grad_items, (embedded, logits) = grad_items.contiguous(), (t.contiguous() for t in saved)
    grad_hidden = [torch.empty_like(h) for h in p.hidden]
    grad_flat = [
        torch.empty_like(w, dtype=flat[0].dtype, memory_format=torch.contiguous_format) for w in flat
    ]
    scratch = torch.empty_like(embedded, dtype=torch.float32)
    grad_embedded, grad_logits = torch.empty_like(embedded), torch.empty_like(logits, dtype=dtype)
    sizes = tuple(w.numel() for w in flat)
    starts = (0, *accumulate(sizes))
    size = starts[-1]
    width_blocks, unit_blocks = cdiv(max(p.sizes["WIDTHS"]), p.tile.columns), cdiv(inner, p.tile.units)
    # Twice as many parts of the items where there are enough of them to keep so many programs busy.
    crowd = modalities * max(width_blocks, unit_blocks) * (1 if count > 4096 else 2)
    parts, length = split(crowd, cdiv(count, p.tile.items))
    partial = embedded.new_empty((parts, size), dtype=torch.float32)
    walk = (partial, count, length)
    with on_device(embedded):
        names = "WIDTHS M D F TOP_K HAS_PRESENT HAS_COUNTS DTYPE BLOCK_N BLOCK_K BLOCK_F BLOCK_D BLOCK_M"
        launch(
            backward_kernels.items_kernel,
            (cdiv(count, p.tile.items),),
            grad_items,
            grad_probability.contiguous(),
            _total(count, present, counts, embedded),
            embedded,
            logits,
            p.heads,
            p.rest[0],
            *p.rest[2:],
            p.present,
            p.counts,
            scratch,
            grad_embedded,
            grad_logits,
            tuple(grad_hidden),
            count,
            **p.constants(*names.split(), "PRECISION"),
        )
        launch(
            backward_kernels.heads_kernel,
            (width_blocks, modalities, parts),
            grad_embedded,
            p.hidden,
            *walk,
            STARTS=starts[: modalities + 1],
            SIZE=size,
            **p.constants("WIDTHS", "M", "D", "DTYPE", "BLOCK_N", "BLOCK_K", "BLOCK_D", "PRECISION"),
        )
        launch(
            backward_kernels.router_kernel,
            (modalities, parts),
            grad_logits,
            embedded,
            *walk,
            START=starts[2 * modalities],
            SIZE=size,
            **p.constants("M", "D", "BLOCK_N", "BLOCK_D", "BLOCK_M", "PRECISION"),
        )
        names = "M D F TOP_K HAS_PRESENT DTYPE BLOCK_N BLOCK_F BLOCK_D BLOCK_M PRECISION"
        launch(
            backward_kernels.experts_kernel,
            (unit_blocks, modalities, parts),
            grad_items,
            embedded,
            logits,
            *p.rest[2:5],
            p.present,
            *walk,
            START=starts[2 * modalities + 2],
            SIZE=size,
            **p.constants(*names.split()),
        )
        launch(
            backward_kernels.sum_kernel,
            (cdiv(max(sizes), _SUM_BLOCK), len(sizes)),
            partial,
            tuple(grad_flat),
            parts,
            SIZE=size,
            STARTS=starts[:-1],
            SIZES=sizes,
            BLOCK=_SUM_BLOCK,
        )
    pairs = zip((*grad_hidden, *grad_flat), (*hidden, *flat), strict=True)
    return [grad.to(tensor.dtype) for grad, tensor in pairs]


def _total(count: int, present: Tensor | None, counts: Tensor | None, like: Tensor) -> Tensor:
    """What all items count together in the load-balance statistics, as a tensor: nothing waits for it."""
    if present is None:
        total = torch.full((), count, device=like.device) if counts is None else counts.sum()
    else:
        exists = present.any(dim=1)
        total = exists.sum() if counts is None else (exists * counts).sum()
    return total.to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
