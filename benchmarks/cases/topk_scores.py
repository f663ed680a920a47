"""topk_scores, the 10 best of the catalogue: exact results, no gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.cases._shared import register_ranking
from crossan_fast.ops import topk_scores

K = 10


def rank(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    users, items, _, history = inputs
    return list(topk_scores(users, items, K, history, backend=backend))


register_ranking("topk_scores", rank)
