"""What travels through an op's schema: the flat arguments of a call, and the structures that they stand for.

A registered op takes tensors, lists of tensors and plain values; every backend is handed these unchanged. Who
needs weights by name, or towers and their sources, makes them here: `SideNetworkStructure.unflatten` and
`from_static`, `SequenceEncoderWeights.unflatten`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from crossan_fast.config import CrossanConfig


class SideNetworkWeights(NamedTuple):
    """The trainable tensors of a side network, each field a list; T towers, L levels, rank r.

    Attributes:
        down_weight: per tower `[L, r, D]`.
        down_bias: per tower `[L, r]`.
        up_weight: per tower `[L, D, r]`.
        up_bias: per tower `[L, D]`.
        gate: per tower θ `[L]`.
        head_weight: per tower `[d, D]`, a head of two layers as their product.
        head_bias: per tower `[d]`.
        cross_gate: ν `[L]` per ordered pair (m, n), in the order of `SideNetworkStructure.cross_pairs`.
        cross_down: `[r, D_n]` per ordered pair that has T as two matrices (`projected_pairs`).
        cross_up: `[D_m, r]`, likewise.
        pair_weight: `[L, D_narrow, D_wide]` per pair tower of unequal widths (`narrowed_towers`).
        pair_bias: `[L, D_narrow]`, likewise.
    """

    down_weight: Sequence[Tensor]
    down_bias: Sequence[Tensor]
    up_weight: Sequence[Tensor]
    up_bias: Sequence[Tensor]
    gate: Sequence[Tensor]
    head_weight: Sequence[Tensor]
    head_bias: Sequence[Tensor]
    cross_gate: Sequence[Tensor] = ()
    cross_down: Sequence[Tensor] = ()
    cross_up: Sequence[Tensor] = ()
    pair_weight: Sequence[Tensor] = ()
    pair_bias: Sequence[Tensor] = ()

    def flatten(self) -> list[Tensor]:
        """All tensors in field order: how they travel through the registered op."""
        return [tensor for group in self for tensor in group]


@dataclass(frozen=True)
class SideNetworkStructure:
    """What is not a tensor: which towers there are and how they are joined.

    Attributes:
        widths: D_m of each modality.
        sources: per tower its modality `(m,)` or pair `(a, b)`; the first M towers are the modalities'.
        cross: `backbone`, `side` or `none`.
        activation: `gelu` (erf) or `relu`.
        temperature: τ of the gates.
        cross_projection: T is the `identity` where widths agree, or `low_rank` for every pair.
    """

    widths: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]
    cross: str = "backbone"
    activation: str = "gelu"
    temperature: float = 0.1
    cross_projection: str = "identity"

    def __post_init__(self) -> None:
        # Filled now: torch.compile can't trace the lock that Python 3.11 takes when a cached property fills,
        # nor make text of widths that it takes for dynamic.
        for name in ("tower_widths", "cross_pairs", "projected_pairs", "narrowed_towers", "widths_text"):
            getattr(self, name)

    @classmethod
    def of(cls, config: CrossanConfig) -> SideNetworkStructure:
        return cls(
            widths=tuple(m.width for m in config.modalities),
            sources=tuple(t.sources for t in config.towers),
            cross=config.cross if len(config.modalities) > 1 else "none",
            activation=config.activation,
            temperature=config.gate_temperature,
            cross_projection=config.cross_projection,
        )

    @classmethod
    def from_static(
        cls,
        widths: Sequence[int],
        sources: Sequence[int],
        cross: str,
        activation: str,
        temperature: float,
        cross_projection: str,
    ) -> SideNetworkStructure:
        """What `static` stands for."""
        pairs = zip(sources[::2], sources[1::2], strict=True)
        decoded = tuple((a,) if b < 0 else (a, b) for a, b in pairs)
        return cls(tuple(widths), decoded, cross, activation, temperature, cross_projection)

    @property
    def static(self) -> tuple[list[int], list[int], str, str, float, str]:
        """As a schema takes it: widths, two sources a tower (−1 where it has one), and the rest."""
        sources = [index for source in self.sources for index in (*source, -1)[:2]]
        rest = (self.cross, self.activation, self.temperature, self.cross_projection)
        return list(self.widths), sources, *rest

    @cached_property
    def widths_text(self) -> str:
        """The widths as a feature of `Request`."""
        return ",".join(map(str, self.widths))

    @cached_property
    def tower_widths(self) -> tuple[int, ...]:
        return tuple(min(self.widths[m] for m in source) for source in self.sources)

    @cached_property
    def cross_pairs(self) -> tuple[tuple[int, int], ...]:
        """Ordered pairs (m, n): tower m receives from modality n."""
        if self.cross == "none":
            return ()
        count = len(self.widths)
        return tuple((m, n) for m in range(count) for n in range(count) if n != m)

    @cached_property
    def projected_pairs(self) -> tuple[tuple[int, int], ...]:
        """The cross pairs whose T is a pair of matrices: those of unequal widths, or all."""
        every = self.cross_projection == "low_rank"
        return tuple((m, n) for m, n in self.cross_pairs if every or self.widths[m] != self.widths[n])

    @cached_property
    def narrowed_towers(self) -> tuple[int, ...]:
        """Pair towers of unequal widths, which need a Linear from the wider to the narrower."""
        return tuple(
            t
            for t, source in enumerate(self.sources)
            if len(source) == 2 and self.widths[source[0]] != self.widths[source[1]]
        )

    def unflatten(self, tensors: Sequence[Tensor]) -> SideNetworkWeights:
        """What `SideNetworkWeights.flatten` made."""
        towers, crosses = len(self.sources), len(self.cross_pairs)
        projected, narrowed = len(self.projected_pairs), len(self.narrowed_towers)
        sizes = [towers] * 7 + [crosses, projected, projected, narrowed, narrowed]
        if len(tensors) != sum(sizes):
            raise ValueError(f"weights: expected {sum(sizes)} tensors, got {len(tensors)}")
        groups, start = [], 0
        for size in sizes:
            groups.append(list(tensors[start : start + size]))
            start += size
        return SideNetworkWeights(*groups)


class FusionWeights(NamedTuple):
    """The trainable tensors of MOMEF; M modalities, item width d, expert hidden width f (4d).

    Attributes:
        router_weight: `[M, M·d]`.
        router_bias: `[M]`.
        w1: `[M, f, d]`.
        b1: `[M, f]`.
        w2: `[M, d, f]`.
        b2: `[M, d]`.
    """

    router_weight: Tensor
    router_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class SequenceEncoderBlock(NamedTuple):
    """One block's tensors; item width d, feed-forward width f (4d). No bias in attention.

    Attributes:
        query, key, value, out: `[d, d]`.
        attention_gain, attention_bias: `[d]`, the norm after attention.
        widen, widen_bias: `[f, d]`, `[f]`.
        narrow, narrow_bias: `[d, f]`, `[d]`.
        forward_gain, forward_bias: `[d]`, the norm after the feed-forward.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    attention_gain: Tensor
    attention_bias: Tensor
    widen: Tensor
    widen_bias: Tensor
    narrow: Tensor
    narrow_bias: Tensor
    forward_gain: Tensor
    forward_bias: Tensor


class SequenceEncoderWeights(NamedTuple):
    """The trainable tensors.

    Attributes:
        position: `[window, d]`; sequences shorter than the window use its last rows.
        gain, bias: `[d]`, the norm before the blocks.
        blocks: see `SequenceEncoderBlock`.
    """

    position: Tensor
    gain: Tensor
    bias: Tensor
    blocks: Sequence[SequenceEncoderBlock]

    def flatten(self) -> list[Tensor]:
        """All tensors in field order, block by block."""
        return [self.position, self.gain, self.bias, *(tensor for block in self.blocks for tensor in block)]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor]) -> SequenceEncoderWeights:
        """What `flatten` made."""
        position, gain, bias, *rest = tensors
        size = len(SequenceEncoderBlock._fields)
        blocks = [SequenceEncoderBlock(*rest[i : i + size]) for i in range(0, len(rest), size)]
        return cls(position, gain, bias, blocks)
