"""fusion (MOMEF) by itself, all experts and the best two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.side_network import (
    CATALOGUE,
    PAPER_ITEMS,
    Shape,
    fusion_weights,
    rows_in_parts,
)
from benchmarks.operators import Operator, set_count
from benchmarks.registry import Case, Setting, Workload, register
from crossan_fast.ops import FusionWeights, fusion


def build(shape: Shape, top_k: int | None, setting: Setting) -> Workload:
    generator = setting.generator(f"fusion/{shape}")
    element = setting.dtype.itemsize
    size = (shape.items, shape.modalities, shape.embedding)

    def call(weights: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        return [fusion(inputs[0], FusionWeights(*weights), top_k=top_k, backend=backend).items]

    count = set_count(shape.fusion_floors(element)["forward"].bytes, setting.device)
    return Operator(
        setting=setting,
        weights=fusion_weights(shape, setting),
        sets=[
            [torch.randn(size, device=setting.device, generator=generator).to(setting.dtype)]
            for _ in range(count)
        ],
        call=call,
        cotangents=[torch.randn(shape.items, shape.embedding, device=setting.device, generator=generator)],
        floors=shape.fusion_floors(element),
        differentiable=1,
        split=rows_in_parts,
    ).workload()


def _register(
    shape: Shape, importance: int, *tags: str, top_k: int | None = None, compiled: bool = False
) -> None:
    chosen = "" if top_k is None else f",top_k={top_k}"
    register(
        Case(
            name=f"fusion/N={shape.items},M={shape.modalities},d={shape.embedding}{chosen}",
            build=partial(build, shape, top_k),
            # The best two of bf16's rounded router are not always float64's best two.
            dtypes=("fp32",) if top_k else ("fp32", "bf16"),
            tags=frozenset(tags),
            importance=importance,
            compiled=compiled,
            reference_bytes=100.0 * shape.items * shape.modalities * shape.embedding,
        )
    )


_register(Shape(PAPER_ITEMS), 6, "paper", "batch", "items", compiled=True)
_register(Shape(CATALOGUE), 7, "paper", "batch", "items", compiled=True)
_register(Shape(PAPER_ITEMS), 44, "paper", top_k=2)
for places in (2_816, 11_264):
    _register(Shape(places), 32, "batch", "items")
for count in (1, 2, 8):
    _register(Shape(PAPER_ITEMS, modalities=count), 45, "modalities")
