"""What cases of several ops share: drawn sequences, sizes of the recipe, inputs of the ranking ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import ExactOperator, Operator, Part, Tensors, set_count
from benchmarks.registry import Case, Floor, Setting, Workload, register

WINDOW, WIDTH = 10, 64
USERS = 12_076  # of the Scientific data
PART_ELEMENTS = 2**25  # logits of a piece of the float64 reference: 256 MB
LOSS_BATCHES = ((64, 8), (1_024, 2), (256, 33), (4_096, 34))  # users, importance
RANKING_BATCHES = ((USERS, 9), (64, 36), (1_024, 36), (256, 37), (4_096, 37))

Rank = Callable[[Sequence[Tensor], str], list[Tensor]]


def random_sequences(
    users: int, catalogue: int, device: torch.device, generator: torch.Generator, window: int = WINDOW
) -> Tensor:
    """Item ids `[B, S + 1]` left-padded with 0: lengths 3 … S + 1, popularity falling with the id's rank."""
    uniform = torch.rand(users, window + 1, device=device, generator=generator)
    # Density ∝ 1/√id: the most popular tenth of the items gets a third of the places.
    ids = (uniform.square() * catalogue).to(torch.int64).clamp_max(catalogue - 1) + 1
    lengths = torch.randint(3, window + 2, (users, 1), device=device, generator=generator)
    return torch.where(torch.arange(window + 1, device=device) >= window + 1 - lengths, ids, 0)


def distinct_sequences(
    users: int, catalogue: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Full rows, as many distinct ids as the places and the catalogue allow: the most columns."""
    places = users * (WINDOW + 1)
    rounds = [
        torch.randperm(catalogue, device=device, generator=generator) for _ in range(-(-places // catalogue))
    ]
    return torch.cat(rounds)[:places].reshape(users, WINDOW + 1) + 1


def matmul_floors(rows: int, columns: int, element: int) -> dict[str, Floor]:
    """One product of users and items; the backward makes the logits again and two products from them."""
    read = (rows + columns) * WIDTH * element
    flops = 2.0 * rows * columns * WIDTH
    return {
        "forward": Floor(read, flops),
        "backward": Floor(2 * read, 3 * flops),
        "both": Floor(3 * read, 4 * flops),
    }


def loss_operator(
    setting: Setting,
    one_set: Callable[[], Tensors],
    call: Callable[[Tensors, Tensors, str], Tensors],
    floors: Mapping[str, Floor],
    split: Callable[[Tensors, Tensors], Iterator[Part]],
    peers: Mapping[str, Callable[[Tensors, Tensors], Tensors]] | None = None,
) -> Operator:
    """A loss of users and items, the first two tensors of a set; arguments as `Operator`."""
    return Operator(
        setting=setting,
        weights=[],
        sets=[one_set() for _ in range(set_count(floors["forward"].bytes, setting.device))],
        call=call,
        cotangents=[torch.ones((), device=setting.device)],
        floors=floors,
        differentiable=2,
        split=split,
        peers=peers,
    )


def ranking_inputs(users: int, setting: Setting, generator: torch.Generator, exact: bool) -> list[Tensor]:
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


def register_ranking(op: str, rank: Rank) -> None:
    """A case for each of `RANKING_BATCHES`: `rank` of so many users against the catalogue."""
    for users, importance in RANKING_BATCHES:
        register(
            Case(
                name=f"{op}/users={users},items={CATALOGUE},d={WIDTH}",
                build=partial(_ranking_workload, op, rank, users),
                dtypes=("fp32", "bf16") if users == USERS else ("fp32",),
                tags=frozenset({"ranking", "paper"} if users == USERS else {"ranking", "batch"}),
                importance=importance,
                compiled=users == USERS,
                reference_bytes=4.0 * 3 * users * 4096,
            )
        )


def _ranking_workload(op: str, rank: Rank, users: int, setting: Setting) -> Workload:
    generator = setting.generator(f"{op}/{users}")
    element = setting.dtype.itemsize
    products = 2.0 * users * CATALOGUE * WIDTH
    floor = Floor((users + CATALOGUE) * WIDTH * element, products)
    sets = set_count(floor.bytes, setting.device)
    return ExactOperator(
        setting=setting,
        sets=[ranking_inputs(users, setting, generator, exact=False) for _ in range(min(sets, 4))],
        exact=ranking_inputs(users, setting, generator, exact=True),
        call=rank,
        floor=floor,
    ).workload()
