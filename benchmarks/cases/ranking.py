"""topk_scores, rank_of_target and deduplicate: exact results, no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.losses import WIDTH, WINDOW, random_sequences
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import ExactOperator, set_count
from benchmarks.registry import Case, Floor, Setting, Workload, register
from crossan_fast.ops import deduplicate, rank_of_target, topk_scores

USERS = 12_076  # of the Scientific data
K = 10


def _inputs(users: int, setting: Setting, generator: torch.Generator, exact: bool) -> list[Tensor]:
    """Users, items, targets and histories; with `exact` small integers, whose products any type holds."""

    def values(rows: int) -> Tensor:
        size = (rows, WIDTH)
        if exact:
            drawn = torch.randint(-1, 2, size, device=setting.device, generator=generator)
        else:
            drawn = torch.randn(size, device=setting.device, generator=generator)
        return drawn.to(setting.dtype)

    history = random_sequences(users, CATALOGUE, setting.device, generator)
    targets = torch.randint(1, CATALOGUE + 1, (users,), device=setting.device, generator=generator)
    return [values(users), values(CATALOGUE + 1), targets, history]


def build_ranking(op: str, users: int, setting: Setting) -> Workload:
    generator = setting.generator(f"{op}/{users}")
    element = setting.dtype.itemsize
    products = 2.0 * users * CATALOGUE * WIDTH
    floor = Floor((users + CATALOGUE) * WIDTH * element, products)

    def call(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        vectors, items, targets, history = inputs
        if op == "rank_of_target":
            return [rank_of_target(vectors, items, targets, history, backend=backend)]
        return list(topk_scores(vectors, items, K, history, backend=backend))

    sets = set_count(floor.bytes, setting.device)
    return ExactOperator(
        setting=setting,
        sets=[_inputs(users, setting, generator, exact=False) for _ in range(min(sets, 4))],
        exact=_inputs(users, setting, generator, exact=True),
        call=call,
        floor=floor,
    ).workload()


def build_deduplicate(users: int, setting: Setting) -> Workload:
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


for op in ("rank_of_target", "topk_scores"):
    for count, importance in ((USERS, 9), (64, 36), (1_024, 36), (256, 37), (4_096, 37)):
        register(
            Case(
                name=f"{op}/users={count},items={CATALOGUE},d={WIDTH}",
                build=partial(build_ranking, op, count),
                dtypes=("fp32", "bf16") if count == USERS else ("fp32",),
                tags=frozenset({"ranking", "paper"} if count == USERS else {"ranking", "batch"}),
                importance=importance,
                compiled=count == USERS,
                reference_bytes=4.0 * 3 * count * 4096,
            )
        )
for users in (64, 256, 1_024, 4_096):
    register(
        Case(
            name=f"deduplicate/users={users},places={users * (WINDOW + 1)}",
            build=partial(build_deduplicate, users),
            dtypes=("fp32",),
            tags=frozenset({"deduplicate", "batch"} | ({"paper"} if users == 64 else set())),
            importance=10 if users == 64 else 38,
        )
    )
