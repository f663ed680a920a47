"""sequence_encoder in Triton: a kernel forward; backward one over places, and one or two for the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._blocks import cdiv, on_device, split
from crossan_fast.kernels._common import dot_precision, launch, power_of_two, uniform
from crossan_fast.kernels.sequence_encoder.backward_kernels import backward_kernel
from crossan_fast.kernels.sequence_encoder.forward_kernels import forward_kernel
from crossan_fast.kernels.sequence_encoder.weight_gradient_kernels import sum_kernel, sums_kernel
from crossan_fast.ops._contracts import SequenceEncoderBlock, SequenceEncoderWeights
from crossan_fast.ops._dispatch import Request
from crossan_fast.ops.sequence_encoder import kept_width

LONGEST, WIDEST, WIDEST_FP32 = 64, 128, 64
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_SUM_BLOCKS = 16, 256
# Up to so many blocks of places a program sums all of them, in tiles small enough for a program on every
# multiprocessor: parts would cost a second launch, and more than they save.
_AT_ONCE, _SIDE_AT_ONCE = 24, 32


def refuses(request: Request) -> str | None:
    """See `crossan_fast.ops._triton`."""
    if (window := request.size("window", LONGEST)) > LONGEST:
        return f"serves at most {LONGEST} places, got {window}"
    # Without matrix units a wider sequence's tiles need more shared memory than an sm_89 has.
    widest = WIDEST_FP32 if request.dtype == torch.float32 else WIDEST
    if (width := request.size("width", widest)) > widest:
        return f"serves at most {widest} numbers a place in {request.dtype}, got {width}"
    return None if request.size("blocks", 1) else "serves at least one block, got none"


class Config(NamedTuple):
    """Of a sequence inner units, warps, pipeline stages; of a weight's tile places, side, warps, stages."""

    units: int
    warps: int
    stages: int
    places: int
    side: int
    product_warps: int
    product_stages: int


def config(matrix_units: bool, large: bool) -> Config:
    """The tiles for products on matrix units, or without; `large`: a sequence's tile is more than 16 × 64."""
    units, stages = (32, 1) if large else (64, 3)
    if matrix_units:
        return Config(units, 8, stages, 64, 64, 4, 3)
    return Config(32, 8, stages, 32, 32, 4, 1)


class _Problem:
    """What every launch of a call is told: contiguous inputs and constants."""

    def __init__(
        self,
        items: Tensor,
        mask: Tensor,
        weights: Sequence[Tensor],
        heads: int,
        dropout: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.batch, self.places, self.width = items.shape
        self.rows = self.batch * self.places
        self.mask = mask.contiguous().view(torch.uint8)
        packed = uniform(weights)
        layers = SequenceEncoderWeights.unflatten(packed).blocks
        self.layers, self.inner, self.window = len(layers), layers[0].widen.shape[0], packed[0].shape[0]
        self.position, self.norm, self.blocks = packed[0], tuple(packed[1:3]), tuple(packed[3:])
        self.seed = seed if dropout else None
        padded, precision = power_of_two(self.places), dot_precision(dtype)
        large = padded > 16 or self.width > 64
        self.tile = config(precision != "ieee" or dtype != torch.float32, large)
        self.precision = {"PRECISION": precision}
        self.constants: dict[str, Any] = {
            "SIZES": (self.width, heads, self.inner, self.layers, self.window),
            "BLOCKS": (padded, power_of_two(self.width), power_of_two(self.width // heads), self.tile.units),
            "DROPOUT": (min(round(dropout * 2**32), 2**32 - 1), 1 / (1 - dropout)),
            "DTYPE": _TYPES[dtype],
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "maxnreg": 255,  # else the assembler may spill, for several programs a multiprocessor
            **self.precision,
        }


def forward(
    items: Tensor,
    mask: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments as in the op's schema.

    Returns:
        users `[B, S, d]` in `dtype`, and with `keep` what the backward reads, else no rows of it.
    """
    p = _Problem(items, mask, weights, heads, dropout, seed, dtype)
    users = items.new_empty(items.shape, dtype=dtype)
    numbers = kept_width(p.width, p.inner, heads, p.layers)
    kept = items.new_empty((p.rows if keep else 0, numbers), dtype=torch.float32)
    if p.rows:
        with on_device(items):
            launch(
                forward_kernel,
                (p.batch,),
                items.contiguous(),
                p.mask,
                p.position,
                p.norm,
                p.blocks,
                p.seed,
                users,
                kept if keep else None,
                p.rows,
                p.places,
                EPS=eps,
                **p.constants,
            )
    return users, kept


def backward(
    grad_users: Tensor,
    kept: Tensor,
    items: Tensor,
    mask: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of `items`, then of `weights`, each in its tensor's own dtype."""
    p = _Problem(items, mask, weights, heads, dropout, seed, dtype)
    if not p.rows:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (items, *weights)]
    grad_items = torch.empty_like(items, memory_format=torch.contiguous_format)
    layout = _Layout(p.width, p.inner, p.layers)
    flow = items.new_empty((p.rows * p.layers * layout.flow_width,), dtype=dtype)
    vectors = items.new_empty((p.batch, layout.vector_width + p.places * p.width), dtype=torch.float32)
    with on_device(items):
        launch(
            backward_kernel,
            (p.batch,),
            grad_users.contiguous(),
            kept.contiguous(),
            p.mask,
            p.norm,
            p.blocks,
            p.seed,
            grad_items,
            flow,
            vectors,
            p.rows,
            p.places,
            **p.constants,
        )
        grads = _weight_gradients(p, layout, flow, vectors)
    return [grad_items, *(grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))]


class _Layout:
    """Where `flow`, `vectors` and the parts of matrices hold what; the kernels' files say in words."""

    def __init__(self, width: int, inner: int, layers: int) -> None:
        d, f = self.width, self.inner = width, inner
        self.layers = layers
        self.flow_width, self.block_vectors = 8 * d + 2 * f, 5 * d + f
        self.vector_width = 2 * d + layers * self.block_vectors
        # Of each matrix: rows, columns, and where both sides of its product begin in `flow`.
        self.matrices = {
            "query": (d, d, 0, 5 * d),
            "key": (d, d, d, 5 * d),
            "value": (d, d, 2 * d, 5 * d),
            "out": (d, d, 3 * d, 6 * d),
            "widen": (f, d, 8 * d + f, 7 * d),
            "narrow": (d, f, 4 * d, 8 * d),
        }
        starts = accumulate((rows * columns for rows, columns, *_ in self.matrices.values()), initial=0)
        self.matrix_starts = dict(zip(self.matrices, starts, strict=False))
        self.block_size = 4 * d * d + 2 * f * d
        # Of each vector: where it begins in a block's share of `vectors`.
        self.vector_starts = {
            "attention_gain": 0,
            "attention_bias": d,
            "forward_gain": 2 * d,
            "forward_bias": 3 * d,
            "narrow_bias": 4 * d,
            "widen_bias": 5 * d,
        }

    def split(self, grads: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, int]]]:
        """Of all weights in order: matrices as `matrices` has them, and the others with their starts."""
        position, gain, bias, *blocks = grads
        vectors = [(position, self.vector_width), (gain, 0), (bias, self.width)]
        matrices = []
        fields = SequenceEncoderBlock._fields
        for layer in range(self.layers):
            own = dict(zip(fields, blocks[layer * len(fields) :], strict=False))
            matrices += [own[name] for name in self.matrices]
            first = 2 * self.width + layer * self.block_vectors
            vectors += [(own[name], first + start) for name, start in self.vector_starts.items()]
        return tuple(matrices), vectors


def _weight_gradients(p: _Problem, layout: _Layout, flow: Tensor, vectors: Tensor) -> list[Tensor]:
    """In the packed weights' dtype."""
    grads = tuple(torch.empty_like(w) for w in (p.position, *p.norm, *p.blocks))
    matrices, others = layout.split(grads)
    tile, at_once = p.tile, cdiv(p.rows, p.tile.places) <= _AT_ONCE
    side = min(tile.side, _SIDE_AT_ONCE) if at_once else tile.side
    products = [(*layout.matrices[name], layout.matrix_starts[name]) for name in layout.matrices]
    tiles = [cdiv(rows, side) * cdiv(columns, side) for rows, columns, *_ in products]
    chunks = [cdiv(grad.numel(), _SUM_BLOCKS[1]) for grad, _ in others]
    parts, length = 1, cdiv(p.rows, tile.places)
    if not at_once:
        parts, length = split(p.layers * sum(tiles), length)
    size = p.layers * layout.block_size
    partial = vectors.new_empty((parts, size)) if parts > 1 else None
    launch(
        sums_kernel,
        (p.layers * sum(tiles) + sum(chunks), parts),
        flow,
        vectors,
        partial,
        matrices,
        tuple(grad for grad, _ in others),
        p.rows,
        length,
        p.batch,
        vectors.shape[1],
        (p.window - p.places) * p.width,
        LAYERS=p.layers,
        PRODUCTS=tuple(number for product in products for number in product),
        FIRST_TILES=tuple(accumulate(tiles, initial=0)),
        FLOW_WIDTH=layout.flow_width,
        WEIGHTS=layout.block_size,
        STARTS=tuple(start for _, start in others),
        SIZES=tuple(grad.numel() for grad, _ in others),
        FIRST_CHUNKS=tuple(accumulate(chunks[:-1], initial=0)),
        BLOCK_N=tile.places,
        BLOCK_C=side,
        BLOCK_P=_SUM_BLOCKS[0],
        BLOCK=_SUM_BLOCKS[1],
        num_warps=tile.product_warps,
        num_stages=tile.product_stages,
        **p.precision,
    )
    if partial is not None:
        sizes = tuple(grad.numel() for grad in matrices)
        launch(
            sum_kernel,
            (cdiv(max(sizes), _SUM_BLOCKS[1]), len(matrices)),
            partial,
            matrices,
            parts,
            STARTS=tuple(accumulate(sizes[:-1], initial=0)),
            SIZES=sizes,
            SIZE=size,
            BLOCK_P=_SUM_BLOCKS[0],
            BLOCK=_SUM_BLOCKS[1],
        )
    return list(grads)
