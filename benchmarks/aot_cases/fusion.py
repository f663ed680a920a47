"""fusion: MOMEF at the paper's size, few items and many."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, Case, new, products
from crossan_fast.kernels import fusion
from crossan_fast.ops import FusionWeights

_HOT = frozenset({"forward_kernel", "items_kernel", "experts_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        for items in (704, 20_314):
            run = partial(call, items, kind)
            yield Case(f"fusion n={items} d=64", dtype, run, _HOT, products(_HOT, dtype))


def call(items: int, dtype: torch.dtype) -> None:
    """MOMEF of four towers' embeddings of d = 64, every expert chosen, weights of the compute dtype."""
    modalities, d = 4, 64

    def own(*shape: int) -> torch.Tensor:
        return new(*shape, kind=dtype)

    weights = FusionWeights(
        own(modalities, modalities * d),
        own(modalities),
        own(modalities, 4 * d, d),
        own(modalities, 4 * d),
        own(modalities, d, 4 * d),
        own(modalities, d),
    )
    call = (own(items, modalities, d), weights, None, None, None, dtype)
    grad, _, probability, logits = fusion.forward(*call)
    fusion.backward(grad, probability, logits, *call)
