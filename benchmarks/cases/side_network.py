"""side_network and item_encoder (side_network + fusion): sizes of the paper, and along each axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.operators import Operator, Part, set_count
from benchmarks.registry import Case, Floor, Setting, Workload, register
from crossan_fast import CrossanConfig, Modality
from crossan_fast.model import CrossanModel
from crossan_fast.ops import FusionWeights, SideNetworkStructure, fusion, has_kernel, side_network

PAPER_ITEMS, CATALOGUE = 704, 20_314
PART = 1024  # rows of a piece of the float64 reference


@dataclass(frozen=True)
class Shape:
    """N items, M modalities of width D at L levels, rank r, embedding width d."""

    items: int
    modalities: int = 4
    width: int = 768
    levels: int = 7
    rank: int = 64
    embedding: int = 64

    def __str__(self) -> str:
        return f"N={self.items},M={self.modalities},D={self.width},L={self.levels},r={self.rank}"

    def config(self) -> CrossanConfig:
        return CrossanConfig(
            modalities=tuple(Modality(f"m{m}", self.width, self.levels) for m in range(self.modalities)),
            embedding_dim=self.embedding,
            bottleneck=self.rank,
        )

    def side_floors(self, element: int) -> dict[str, Floor]:
        """The floor: states read once by each pass, bottlenecks and e written and read.

        Heads are folded in where that is less work than h itself, as in all but narrow towers. Products of
        weights alone, made once a call, are in it then: G_lp = W_l W_up,p of all p < l, and in the backward
        what they give both weights. They weigh nothing over a catalogue, but are a fifth of all at a batch's
        704 items.
        """
        levels, rank, width, d = self.levels, self.rank, self.width, self.embedding
        towers = self.items * self.modalities
        states = towers * levels * width * element
        kept = towers * (levels * rank + d) * element
        weights = self.modalities * width * (2 * levels * rank + d) * element
        down, head = 2.0 * towers * levels * width * rank, 2.0 * towers * width * d
        linked = levels * (levels - 1) // 2 * rank**2 + levels * rank * d
        links = 2.0 * towers * linked
        made = 2.0 * self.modalities * linked * width
        flops = (down + head + links + made, 2 * (down + head + links + made))
        if 4 * levels * rank * width < 3 * linked:  # h is made, in the backward again, and up has gradients
            flops = (2 * down + head, 5 * down + 2 * head)
        # Weight gradients are fp32, as the weights are.
        forward = Floor(states + kept + weights, flops[0])
        backward = Floor(states + kept + weights + 4 * weights // element, flops[1])
        return _with_both(forward, backward)

    def fusion_floors(self, element: int) -> dict[str, Floor]:
        m, d, f = self.modalities, self.embedding, 4 * self.embedding
        entering = self.items * m * d * element
        kept = self.items * d * element
        weights = m * 2 * d * f * element
        flops = 2.0 * self.items * m * (m * d + 2 * d * f)
        return _with_both(
            Floor(entering + kept + weights, flops), Floor(2 * entering + kept + 3 * weights, 2 * flops)
        )

    def encoder_floors(self, element: int) -> dict[str, Floor]:
        """side_network then fusion with e never leaving the chip: its bytes cross nothing."""
        side, fused = self.side_floors(element), self.fusion_floors(element)
        entering = self.items * self.modalities * self.embedding * element
        crossing = {"forward": 2 * entering, "backward": 3 * entering, "both": 5 * entering}
        return {
            name: Floor(
                side[name].bytes + fused[name].bytes - crossing[name], side[name].flops + fused[name].flops
            )
            for name in side
        }

    def reference_bytes(self, element: int) -> float:
        """What eager keeps for its backward: several tensors of width D a level and tower."""
        return 4.0 * self.items * self.modalities * self.levels * self.width * element


def _with_both(forward: Floor, backward: Floor) -> dict[str, Floor]:
    both = Floor(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"forward": forward, "backward": backward, "both": both}


def random_states(
    shape: Shape, setting: Setting, generator: torch.Generator, rows: int | None = None
) -> list[Tensor]:
    size = (rows or shape.items, shape.levels, shape.width)
    return [
        torch.randn(size, device=setting.device, generator=generator).to(setting.dtype)
        for _ in range(shape.modalities)
    ]


def side_weights(
    shape: Shape, setting: Setting, config: CrossanConfig | None = None
) -> tuple[list[Tensor], SideNetworkStructure]:
    """Weights as training leaves them: gates open, biases not zero."""
    model = CrossanModel(config or shape.config())
    generator = torch.Generator().manual_seed(1)
    weights = []
    for tensor in model.towers.weights(model.heads).flatten():
        spread = 0.1 if tensor.dim() < 3 else shape.width**-0.5
        weights.append((spread * torch.randn(tensor.shape, generator=generator)).to(setting.device))
    return weights, model.towers.structure


def fusion_weights(shape: Shape, setting: Setting) -> list[Tensor]:
    m, d, f = shape.modalities, shape.embedding, 4 * shape.embedding
    shapes = [(m, m * d), (m,), (m, f, d), (m, f), (m, d, f), (m, d)]
    generator = torch.Generator().manual_seed(2)
    return [(size[-1] ** -0.5 * torch.randn(size, generator=generator)).to(setting.device) for size in shapes]


def rows_in_parts(inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Iterator[Part]:
    """Items are independent: the reference may take them piece by piece."""
    for start in range(0, inputs[0].shape[0], PART):
        cut = slice(start, start + PART)
        yield Part([t[cut] for t in inputs], [t[cut] for t in cotangents])


def _cotangent(shape: Shape, setting: Setting, generator: torch.Generator) -> Tensor:
    size = (shape.items, shape.modalities, shape.embedding)
    return torch.randn(size, device=setting.device, generator=generator)


def build_side_network(shape: Shape, setting: Setting) -> Workload:
    weights, structure = side_weights(shape, setting)
    generator = setting.generator(f"side_network/{shape}")
    element = setting.dtype.itemsize
    count = set_count(shape.side_floors(element)["forward"].bytes, setting.device)
    return Operator(
        setting=setting,
        weights=weights,
        sets=[random_states(shape, setting, generator) for _ in range(count)],
        call=lambda w, states, backend: [
            side_network(states, structure.unflatten(w), structure, backend=backend)
        ],
        cotangents=[_cotangent(shape, setting, generator)],
        floors=shape.side_floors(element),
        split=rows_in_parts,
    ).workload()


def build_missing(shape: Shape, architecture: Literal["crossan", "iisan"], setting: Setting) -> Workload:
    """Items that lack modalities, a few of them all, in CROSSAN's towers or IISAN's with its pairs'."""
    config = shape.config()
    if architecture == "iisan":
        config = CrossanConfig.iisan(config.modalities, bottleneck=shape.rank, embedding_dim=shape.embedding)
    weights, structure = side_weights(shape, setting, config)
    generator = setting.generator(f"side_network_missing/{shape}/{architecture}")

    def one_set() -> list[Tensor]:
        size = (shape.items, shape.modalities)
        present = torch.rand(size, device=setting.device, generator=generator) < 0.7
        return [*random_states(shape, setting, generator), present]

    def call(w: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        *states, present = inputs
        towers = structure.unflatten(w)
        return [side_network(states, towers, structure, present=present, backend=backend)]

    size = (shape.items, len(structure.sources), shape.embedding)
    return Operator(
        setting=setting,
        weights=weights,
        sets=[one_set() for _ in range(2)],
        call=call,
        cotangents=[torch.randn(size, device=setting.device, generator=generator)],
        floors={},
        split=rows_in_parts,
    ).workload()


def build_item_encoder(shape: Shape, setting: Setting) -> Workload:
    side, structure = side_weights(shape, setting)
    generator = setting.generator(f"item_encoder/{shape}")
    element = setting.dtype.itemsize
    count = set_count(shape.side_floors(element)["forward"].bytes, setting.device)

    def call(weights: Sequence[Tensor], states: Sequence[Tensor], backend: str) -> list[Tensor]:
        towers = structure.unflatten(weights[: len(side)])
        embeddings = side_network(states, towers, structure, backend=backend)
        momef = FusionWeights(*weights[len(side) :])
        # As the model does: a backend without this kernel leaves it to the automatic choice.
        chosen = backend if has_kernel("fusion", backend) else "auto"
        return [fusion(embeddings, momef, backend=chosen).items]

    return Operator(
        setting=setting,
        weights=[*side, *fusion_weights(shape, setting)],
        sets=[random_states(shape, setting, generator) for _ in range(count)],
        call=call,
        cotangents=[torch.randn(shape.items, shape.embedding, device=setting.device, generator=generator)],
        floors=shape.encoder_floors(element),
        split=rows_in_parts,
    ).workload()


def build_gather(shape: Shape, stored: torch.dtype, setting: Setting) -> Workload:
    """Rows read by id from a resident cache in its storage type; eager has to make the gathered copy."""
    weights, structure = side_weights(shape, setting)
    generator = setting.generator(f"side_network_gather/{shape}/{stored}")
    table = random_states(shape, setting, generator, rows=CATALOGUE + 1)
    if stored.is_floating_point and stored.itemsize > 1:
        table, scales = [t.to(stored) for t in table], None
    else:
        limit = 127 if stored == torch.int8 else 448
        scales = [t.abs().amax(2).float() / limit for t in table]
        quantized = [t.float() / s[:, :, None] for t, s in zip(table, scales, strict=True)]
        table = [(q.round() if stored == torch.int8 else q).to(stored) for q in quantized]
    sets = [
        [torch.randperm(CATALOGUE, device=setting.device, generator=generator)[: shape.items] + 1]
        for _ in range(8)
    ]

    def call(w: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        towers = structure.unflatten(w)
        return [side_network(table, towers, structure, ids=inputs[0], scales=scales, backend=backend)]

    return Operator(
        setting=setting,
        weights=weights,
        sets=sets,
        call=call,
        cotangents=[_cotangent(shape, setting, generator)],
        floors=shape.side_floors(stored.itemsize),
        split=rows_in_parts,
    ).workload()


def _register(shape: Shape, importance: int, *tags: str, compiled: bool = False) -> None:
    for op, build, extra in (
        ("item_encoder", build_item_encoder, 0),
        ("side_network", build_side_network, 1),
    ):
        register(
            Case(
                name=f"{op}/{shape}",
                build=partial(build, shape),
                tags=frozenset(tags),
                importance=importance + extra,
                compiled=compiled,
                reference_bytes=shape.reference_bytes(4),
            )
        )


_register(Shape(PAPER_ITEMS), 0, "paper", "batch", "modalities", "width", "items", "ci", compiled=True)
_register(Shape(CATALOGUE), 4, "paper", "batch", "items", compiled=True)
for places in (2_816, 11_264):  # B = 256 and 1,024 users of 11 places; B = 4,096 is the whole catalogue
    _register(Shape(places), 30, "batch", "items")
for count in (1, 2, 8):
    _register(Shape(PAPER_ITEMS, modalities=count), 40, "modalities")
for width in (384, 1_024, 4_096):
    _register(Shape(PAPER_ITEMS, width=width), 42, "width")
for width in (64, 128):  # states in a basis; the CPU's op makes h itself at such widths
    _register(Shape(PAPER_ITEMS, modalities=2, width=width), 38, "basis")
_register(Shape(PAPER_ITEMS, modalities=2, width=384), 20, "recipe", compiled=True)
_ARCHITECTURES: tuple[Literal["crossan", "iisan"], ...] = ("crossan", "iisan")
for architecture in _ARCHITECTURES:
    register(
        Case(
            name=f"side_network_missing/{Shape(PAPER_ITEMS, modalities=2)},architecture={architecture}",
            build=partial(build_missing, Shape(PAPER_ITEMS, modalities=2), architecture),
            tags=frozenset({"missing"}),
            importance=36,
        )
    )
for stored in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
    label = str(stored).removeprefix("torch.")
    register(
        Case(
            name=f"side_network_gather/{Shape(PAPER_ITEMS)},cache={label}",
            build=partial(build_gather, Shape(PAPER_ITEMS), stored),
            tags=frozenset({"gather"}),
            importance=35,
        )
    )
