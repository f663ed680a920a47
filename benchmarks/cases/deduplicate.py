"""deduplicate of a batch's sequences: exact results, no gradients."""

from __future__ import annotations

from functools import partial

from benchmarks.cases._shared import WINDOW, random_sequences
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import ExactOperator
from benchmarks.registry import Case, Floor, Setting, Workload, register
from crossan_fast.ops import deduplicate


def build(users: int, setting: Setting) -> Workload:
    generator = setting.generator(f"deduplicate/{users}")
    ids = [random_sequences(users, CATALOGUE, setting.device, generator) for _ in range(8)]
    places = ids[0].numel()
    return ExactOperator(
        setting=setting,
        sets=[[t] for t in ids],
        exact=[ids[0]],
        call=lambda inputs, backend: list(deduplicate(inputs[0], places + 1, backend=backend)),
        # Ids read, slots written, ids and counts of at most as many distinct ones written.
        floor=Floor(8.0 * 4 * places),
        compiled=False,  # torch.unique breaks the graph: there is nothing to compile
    ).workload()


for users in (64, 256, 1_024, 4_096):
    register(
        Case(
            name=f"deduplicate/users={users},places={users * (WINDOW + 1)}",
            build=partial(build, users),
            dtypes=("fp32",),
            tags=frozenset({"deduplicate", "batch"} | ({"paper"} if users == 64 else set())),
            importance=10 if users == 64 else 38,
        )
    )
