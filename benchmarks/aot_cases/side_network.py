"""side_network: the paper's network and wider ones, caches of 8 bits, and every other kind, small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.aot_cases import DTYPES, OTHER_DTYPES, Case, new, products
from crossan_fast.kernels import side_network
from crossan_fast.ops import SideNetworkStructure, SideNetworkWeights

_TYPES = {**DTYPES, **OTHER_DTYPES}
_STORED = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
_FORWARD = frozenset({"fused_kernel", "down_kernel", "walk_kernel"})
_HOT = _FORWARD | {"grad_walk_kernel", "mixing_gradient_kernel", "down_gradient_kernel"}


def cases() -> Iterator[Case]:
    """See `benchmarks.aot_cases`."""
    for items, width, dtype, stored in (
        (704, 768, "bf16", None),
        (20_314, 768, "bf16", None),
        (20_314, 768, "bf16", torch.float8_e4m3fn),
        (20_314, 768, "bf16", torch.int8),
        (704, 768, "fp32", None),
        (704, 768, "tf32", None),
        (704, 768, "fp16", None),
        # The backward's chunk of items: larger counts compile the same for their first chunk.
        (8_192, 1024, "bf16", None),
        (704, 4096, "bf16", None),
        (8_192, 4096, "bf16", None),
    ):
        yield Case(
            f"side_network n={items} D={width} r=64" + (f" {_STORED[stored]}" if stored else ""),
            dtype,
            partial(call, items, width, _TYPES[dtype], stored),
            hot=_HOT,
            matrix=products(_HOT | {"mixing_kernel", "combine_kernel"}, dtype),
            # *walk*, and *grad_walk* of few items, take 16 of them, for the number of programs; so does all
            # that reads TF32, whose tiles are fp32's.
            wide=products(_HOT - {"walk_kernel", "grad_walk_kernel"}, dtype)
            if dtype != "tf32"
            else frozenset(),
        )
    # Of the paper's size, what the cases above leave out: items that lack modalities, and IISAN's pairs. The
    # pairs' figures are recorded without a limit: their fused kernel spills six registers on sm_80.
    for name, structure, hot in (
        ("present", _towers(768, 4), _HOT),
        ("pairs present", _towers(768, 4, "none", True), frozenset[str]()),
    ):
        run = partial(call, 704, 768, torch.bfloat16, structure=structure, present=True)
        yield Case(f"side_network n=704 D=768 r=64 {name}", "bf16", run, hot)
    # Every other kind of network, small: that it compiles is what is checked.
    for kind in _KINDS:
        run = partial(
            call,
            64,
            64,
            _TYPES[kind.dtype],
            kind.stored,
            kind.rank,
            kind.levels,
            kind.structure,
            kind.present,
        )
        yield Case(kind.name, kind.dtype, run, short=kind.short)
    # Ranks and embeddings up to 256 must fit as well; there the limits of shared memory are what is checked.
    for rank, embedding in ((256, 64), (64, 256)):
        run = partial(call, 704, 768, torch.bfloat16, None, rank, embedding=embedding)
        yield Case(f"side_network n=704 D=768 r={rank} d={embedding}", "bf16", run)


class _Kind(NamedTuple):
    """A network that differs from the paper's in more than one way."""

    modalities: int
    cross: str
    levels: int = 2
    rank: int = 16
    dtype: str = "bf16"
    widths: tuple[int, ...] | int = 64
    pairs: bool = False
    present: bool = True
    stored: torch.dtype | None = None
    short: bool = False

    @property
    def structure(self) -> SideNetworkStructure:
        return _towers(self.widths, self.modalities, self.cross, self.pairs)

    @property
    def name(self) -> str:
        words = [f"M={self.modalities}", f"cross={self.cross}"]
        words += ["pairs"] * self.pairs + ["present"] * self.present
        words += [_STORED[self.stored]] if self.stored else []
        sizes = f"n=64 D={self.structure.widths_text} r={self.rank} L={self.levels}"
        return f"side_network {sizes} {' '.join(words)}"


# Each value of each of a network's properties at least once, and pairs of them that meet in one kernel.
# Items lack modalities in most, which modality dropout makes as well.
_KINDS = (
    _Kind(1, "none", levels=1, rank=8, dtype="fp32", present=False),
    _Kind(1, "none", levels=7, rank=64, dtype="fp16"),
    _Kind(1, "none", stored=torch.int8),
    _Kind(2, "none"),
    _Kind(2, "none", pairs=True, short=True),
    _Kind(2, "none", dtype="fp16", widths=(64, 32), pairs=True),
    _Kind(2, "none", levels=13, rank=8, dtype="fp32", present=False, stored=torch.float8_e4m3fn),
    _Kind(2, "backbone", levels=1, rank=8),
    _Kind(2, "backbone", levels=13, rank=8, dtype="fp16", stored=torch.int8),
    _Kind(2, "backbone", dtype="bf16", widths=(64, 32), stored=torch.float8_e4m3fn, short=True),
    _Kind(2, "backbone", levels=7, rank=8, dtype="fp32", widths=(64, 32), present=False),
    _Kind(2, "side", short=True),
    _Kind(2, "side", levels=7, rank=64, dtype="fp16", stored=torch.int8),
    _Kind(2, "side", levels=1, rank=8, dtype="fp32", widths=(64, 32)),
    _Kind(4, "none"),
    _Kind(4, "none", pairs=True, present=False),
    _Kind(4, "none", pairs=True, dtype="fp16", stored=torch.float8_e4m3fn),
    _Kind(4, "backbone", levels=13, rank=64),
    _Kind(4, "side", present=False),
    _Kind(4, "side", levels=13, rank=8),
    _Kind(8, "none", levels=1, rank=64, dtype="fp32", stored=torch.int8),
    _Kind(8, "backbone", levels=7, rank=8),
    _Kind(8, "side", rank=8, dtype="fp16"),
)


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
