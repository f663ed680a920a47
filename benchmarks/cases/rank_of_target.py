"""rank_of_target over the catalogue: exact results, no gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.cases._shared import register_ranking
from crossan_fast.ops import rank_of_target


def rank(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    return [rank_of_target(*inputs, backend=backend)]


register_ranking("rank_of_target", rank)
