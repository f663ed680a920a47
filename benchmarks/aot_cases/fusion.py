"""fusion: MOMEF at the paper's size and of wider towers, few items and many."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, Case, new, products
from crossan_fast.kernels import fusion
from crossan_fast.ops import FusionWeights

_HOT = frozenset({"forward_kernel", "items_kernel", "heads_kernel", "experts_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        for items, width in ((704, 768), (20_314, 768), (20_314, 1024), (20_314, 4096)):
            run = partial(call, items, width, kind)
            yield Case(f"fusion n={items} D={width} d=64", dtype, run, _HOT, products(_HOT, dtype))


def call(items: int, width: int, dtype: torch.dtype) -> None:
    """MOMEF of four towers into d = 64, every expert chosen, weights of the compute dtype."""
    modalities, d = 4, 64

    def own(*shape: int) -> torch.Tensor:
        return new(*shape, kind=dtype)

    weights = FusionWeights(
        [own(d, width)] * modalities,
        [own(d)] * modalities,
        own(modalities, modalities * d),
        own(modalities),
        own(modalities, 4 * d, d),
        own(modalities, 4 * d),
        own(modalities, d, 4 * d),
        own(modalities, d),
    )
    hidden = [own(items, width)] * modalities
    call = (hidden, weights.flatten(), None, None, None, dtype)
    grad, _, probability, *saved = fusion.forward(*call)
    fusion.backward(grad, probability, saved, *call)
