"""side_network: the paper's network and wider ones, fp8 caches, items that lack modalities, IISAN's pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot_cases import DTYPES, Case, new, products
from crossan_fast.kernels import side_network
from crossan_fast.ops import SideNetworkStructure, SideNetworkWeights

_FORWARD = frozenset({"fused_kernel", "down_kernel", "walk_kernel"})
_HOT = _FORWARD | {"grad_walk_kernel", "mixing_gradient_kernel", "down_gradient_kernel"}


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for items, width, dtype, stored in (
        (704, 768, "bf16", None),
        (20_314, 768, "bf16", None),
        (20_314, 768, "bf16", torch.float8_e4m3fn),
        (704, 768, "fp32", None),
        # The backward's chunk of items: larger counts compile the same for their first chunk.
        (8_192, 1024, "bf16", None),
        (704, 4096, "bf16", None),
        (8_192, 4096, "bf16", None),
    ):
        yield Case(
            f"side_network n={items} D={width} r=64" + (" fp8" if stored else ""),
            dtype,
            partial(call, items, width, DTYPES[dtype], stored),
            hot=_HOT,
            matrix=products(_HOT | {"mixing_kernel", "combine_kernel"}, dtype),
            # *walk*, and *grad_walk* of few items, take 16 of them, for the number of programs.
            wide=products(_HOT - {"walk_kernel", "grad_walk_kernel"}, dtype),
        )
    # Of the paper's size, what the cases above leave out: items that lack modalities, and IISAN's pairs. The
    # pairs' figures are recorded without a limit: their fused kernel spills six registers on sm_80.
    for name, structure, hot in (
        ("present", _towers(768, 4), _HOT),
        ("pairs present", _towers(768, 4, "none", True), frozenset[str]()),
    ):
        run = partial(call, 704, 768, torch.bfloat16, structure=structure, present=True)
        yield Case(f"side_network n=704 D=768 r=64 {name}", "bf16", run, hot)
    yield from _structures()
    # Ranks and embeddings up to 256 must fit as well; there the limits of shared memory are what is checked.
    for rank, embedding in ((256, 64), (64, 256)):
        run = partial(call, 704, 768, torch.bfloat16, None, rank, embedding=embedding)
        yield Case(f"side_network n=704 D=768 r={rank} d={embedding}", "bf16", run)


def _structures() -> Iterator[Case]:
    """Every kind of network once, small: that each compiles is what is checked."""
    several: dict[tuple[int, str, int | tuple[int, ...], bool], tuple[bool, ...]] = {
        (1, "none", 64, False): (False, True),
        (2, "none", 64, False): (False, True),
        (2, "backbone", 64, False): (True,),
        (2, "side", 64, False): (True,),
        (4, "none", 64, False): (True,),
        (4, "backbone", 64, False): (True,),
        (4, "side", 64, False): (False, True),
        (2, "none", 64, True): (True,),
        (4, "none", 64, True): (False, True),
        (2, "backbone", (64, 32), False): (True,),
        (2, "none", (64, 32), True): (True,),
    }
    for (modalities, cross, width, pairs), presences in several.items():
        structure = _towers(width, modalities, cross, pairs)
        for present in presences:
            words = [f"M={modalities}", f"cross={cross}", *["pairs"] * pairs, *["present"] * present]
            name = f"side_network n=64 D={structure.widths_text} r=16 L=2 {' '.join(words)}"
            run = partial(call, 64, 64, torch.bfloat16, None, 16, 2, structure, present)
            yield Case(name, "bf16", run)


def call(
    items: int,
    width: int,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
    rank: int = 64,
    levels: int = 7,
    structure: SideNetworkStructure | None = None,
    present: bool = False,
    embedding: int = 64,
) -> None:
    """Forward and backward, gathered by id from a resident cache; CROSSAN's towers unless told."""
    structure = structure or _towers(width, 4)
    widths, towers, rows = structure.tower_widths, len(structure.sources), 20_315

    def own(*shape: int) -> torch.Tensor:
        return new(*shape, kind=dtype)

    projected = [(structure.widths[m], structure.widths[n]) for m, n in structure.projected_pairs]
    narrowed = [[structure.widths[m] for m in structure.sources[t]] for t in structure.narrowed_towers]
    weights = SideNetworkWeights(
        [own(levels, rank, d) for d in widths],
        [own(levels, rank)] * towers,
        [own(levels, d, rank) for d in widths],
        [own(levels, d) for d in widths],
        [own(levels)] * towers,
        [own(embedding, d) for d in widths],
        [own(embedding)] * towers,
        [own(levels) for _ in structure.cross_pairs],
        [own(rank, d) for _, d in projected],
        [own(d, rank) for d, _ in projected],
        [own(levels, min(pair), max(pair)) for pair in narrowed],
        [own(levels, min(pair)) for pair in narrowed],
    )
    states = [new(rows, levels, d, kind=stored or dtype) for d in structure.widths]
    scales = [new(rows, levels, kind=torch.float32) for _ in structure.widths] if stored else []
    ids = new(items, kind=torch.int64)
    mask = new(items, len(structure.widths), kind=torch.bool) if present else None
    call = (states, scales, ids, mask, weights.flatten(), *structure.static, dtype)
    side_network.backward(*side_network.forward(*call), *call)


def _towers(
    width: int | tuple[int, ...], modalities: int, cross: str = "backbone", pairs: bool = False
) -> SideNetworkStructure:
    """CROSSAN's towers, or with `pairs` IISAN's: the modalities' own and one of every two modalities."""
    widths = (width,) * modalities if isinstance(width, int) else width
    sources: list[tuple[int, ...]] = [(m,) for m in range(modalities)]
    if pairs:
        sources += itertools.combinations(range(modalities), 2)
    return SideNetworkStructure(widths, tuple(sources), cross, "relu" if pairs else "gelu")
