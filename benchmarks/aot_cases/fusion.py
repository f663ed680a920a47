"""fusion: MOMEF at the paper's size, few items and many; other widths, chosen experts, missing modalities."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import fusion
from crossan_fast.ops import FusionWeights

_HOT = frozenset({"forward_kernel", "items_kernel", "router_kernel", "experts_kernel"})


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for dtype, kind in DTYPES.items():
        for items in (704, 20_314):
            run = partial(call, items, kind)
            yield Case(f"fusion n={items} d=64", dtype, run, _HOT, products(_HOT, dtype))
    for dtype, kind in OTHER_DTYPES.items():
        yield Case("fusion n=704 d=64", dtype, partial(call, 704, kind), _HOT, products(_HOT, dtype))
    # Whatever else changes the code: items that lack modalities (which modality dropout makes as well),
    # counts of the load balance, experts chosen by top-k, and the number of modalities.
    for modalities, d, dtype, present, counts, top_k in (
        (1, 8, "fp32", True, False, None),
        (2, 128, "fp16", False, True, 1),
        (4, 64, "bf16", True, True, 2),
        (8, 32, "bf16", True, False, 3),
    ):
        words = [f"M={modalities} d={d}", *["present"] * present, *["counts"] * counts]
        name = f"fusion n=64 {' '.join([*words, *[f'top_k={top_k}'] * bool(top_k)])}"
        kind = {**DTYPES, **OTHER_DTYPES}[dtype]
        run = partial(call, 64, kind, modalities, d, present, counts, top_k)
        yield Case(name, dtype, run, _HOT, short=modalities == 4)


def call(
    items: int,
    dtype: torch.dtype,
    modalities: int = 4,
    d: int = 64,
    present: bool = False,
    counts: bool = False,
    top_k: int | None = None,
) -> None:
    """MOMEF of the towers' embeddings, every expert chosen unless told, weights of the compute dtype."""

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
    mask = new(items, modalities, kind=torch.bool) if present else None
    counted = new(items, kind=torch.int64) if counts else None
    call = (own(items, modalities, d), weights, mask, top_k, counted, dtype)
    grad, _, probability, logits = fusion.forward(*call)
    fusion.backward(grad, probability, logits, *call)
