"""What Triton's forward of side_network makes of the weights and keeps for its backward, in one tensor.

That is the gates' coefficients, the products of weights G, and the weights in the compute dtype where they
are of another: three launches that a backward would else make again. The fake kernel has to know the size
without Triton, which is why the layout is here and not beside the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossan_fast.ops._contracts import SideNetworkStructure, SideNetworkWeights

_ALIGNED = 4  # fp32 numbers: what kernels may read at once


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is ≥ n and ≥ `least` (16: a matrix instruction's shortest side)."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def operands_of(weights: SideNetworkWeights) -> list[Tensor]:
    """The weights that the kernels multiply by."""
    return [*weights.down_weight, *weights.up_weight, *weights.head_weight]


@dataclass(frozen=True)
class Layout:
    """Where each part lies, in fp32 numbers from the start.

    Attributes:
        coef, carry: of the gates, fp32.
        mixing: G, flat per tower in the compute dtype.
        operands: of each weight that is multiplied by; none where they are of the compute dtype.
        size: numbers a tower of all.
    """

    coef: int
    carry: int
    mixing: int
    operands: tuple[int, ...]
    size: int

    @classmethod
    def of(
        cls, structure: SideNetworkStructure, weights: SideNetworkWeights, dtype: torch.dtype
    ) -> Layout | None:
        """None where the forward keeps nothing: with `cross="side"` there is no G."""
        if structure.cross == "side":
            return None
        # A compiled call may have symbols for sizes, which the weights fix.
        levels, rank = (int(side) for side in weights.down_bias[0].shape)
        r, e = power_of_two(rank), power_of_two(int(weights.head_bias[0].shape[0]))
        towers = len(structure.sources)
        operands = operands_of(weights)
        cast = [int(w.numel()) for w in operands] if any(w.dtype != dtype for w in operands) else []
        mixing = towers * mixing_size(levels, r, e)
        # An upper bound of a tower's sources: its own, every other's, or those of a pair.
        gates = towers * levels * (len(structure.widths) + 1)
        numbers = [gates, towers * levels, *(math.ceil(n * dtype.itemsize / 4) for n in (mixing, *cast))]
        coef, carry, first, *rest, end = _starts(numbers)
        return cls(coef, carry, first, tuple(rest), math.ceil(end / towers))


def mixing_size(levels: int, r: int, e: int) -> int:
    """Numbers of a tower's G, sides padded to r and e."""
    return levels * (levels - 1) // 2 * r * r + levels * e * r


def _starts(numbers: Sequence[int]) -> Iterator[int]:
    at = 0
    for count in numbers:
        yield at
        at += math.ceil(count / _ALIGNED) * _ALIGNED
    yield at
