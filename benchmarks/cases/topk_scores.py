"""topk_scores, the 10 best of the catalogue: exact results, no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from benchmarks.cases._shared import RANKING_BATCHES, USERS, WIDTH, ranking_workload
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.registry import Case, Setting, Workload, register
from crossan_fast.ops import topk_scores

K = 10


def build(users: int, setting: Setting) -> Workload:
    def rank(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        vectors, items, _, history = inputs
        return list(topk_scores(vectors, items, K, history, backend=backend))

    return ranking_workload("topk_scores", rank, users, setting)


for count, importance in RANKING_BATCHES:
    register(
        Case(
            name=f"topk_scores/users={count},items={CATALOGUE},d={WIDTH}",
            build=partial(build, count),
            dtypes=("fp32", "bf16") if count == USERS else ("fp32",),
            tags=frozenset({"ranking", "paper"} if count == USERS else {"ranking", "batch"}),
            importance=importance,
            compiled=count == USERS,
            reference_bytes=4.0 * 3 * count * 4096,
        )
    )
