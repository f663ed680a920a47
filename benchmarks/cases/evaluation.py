"""Evaluation: encoding the catalogue, and ranking every user's target in it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.cases._shared import USERS, WINDOW, random_sequences
from benchmarks.cases.side_network import CATALOGUE, Shape
from benchmarks.cases.step import RECIPE, random_cache
from benchmarks.registry import BACKENDS, Case, CheckFailed, Floor, Runnable, Setting, Workload, register
from crossan_fast import CrossanModel
from crossan_fast.training.ranking import rank_targets

# Nearly equal scores swap with another order of summation: a rank may move by this share of the catalogue.
RANK_SLACK = 1e-3
CHECKED_ITEMS = 1_024


def build_ranking(shape: Shape, users: int, setting: Setting) -> Workload:
    """From histories to ranks: the sequence encoder and rank_of_target, items already encoded."""
    device, generator = setting.device, setting.generator(f"evaluation/{users}")
    sequences = random_sequences(users, CATALOGUE, device, generator)
    items = torch.randn(CATALOGUE + 1, shape.embedding, device=device, generator=generator)
    items[0] = 0

    def ranks(model: CrossanModel, table: Tensor) -> Tensor:
        history = sequences[:, :-1]
        return rank_targets(model, table, history, sequences[:, -1], history)

    @cache
    def truth() -> Tensor:
        return ranks(_model(shape, "eager", setting).double(), items.double())

    def check(name: str, runnable: Runnable) -> None:
        moved = (runnable.forward(0)[0] - truth()).abs().max()
        if int(moved) > RANK_SLACK * CATALOGUE:
            raise CheckFailed(f"{name}: a rank is off by {int(moved)}")

    def make(name: str) -> Runnable:
        model = _model(shape, name, setting)
        return Runnable(lambda _: [ranks(model, items)])

    floor = Floor(4.0 * (users + CATALOGUE) * shape.embedding, 2.0 * users * CATALOGUE * shape.embedding)
    names = ("eager", *BACKENDS)
    return Workload(1, {name: partial(make, name) for name in names}, check, {"run": floor})


def build_catalogue(shape: Shape, setting: Setting) -> Workload:
    """`encode_catalogue`: the side network and fusion over every item; some items are checked."""
    states = random_cache(shape, CATALOGUE, setting, torch.bfloat16)
    spread = torch.arange(0, CATALOGUE + 1, -(-CATALOGUE // CHECKED_ITEMS), device=setting.device)
    last = torch.arange(CATALOGUE - 63, CATALOGUE + 1, device=setting.device)  # of a block that isn't full
    some = torch.cat([spread, last])
    exact = HALF if setting.dtype == torch.bfloat16 else FULL

    @cache
    def truth() -> Tensor:
        return _model(shape, "eager", setting).double().encode_catalogue(states, ids=some)

    def check(name: str, runnable: Runnable) -> None:
        difference = (runnable.forward(0)[0][some].double() - truth()).norm() / truth().norm()
        if not float(difference) <= exact:
            raise CheckFailed(f"{name}: embeddings err by {float(difference):.2e} from float64")

    def make(name: str) -> Runnable:
        model = _model(shape, name, setting)

        def encode(_: int) -> list[Tensor]:
            enabled = setting.dtype != torch.float32
            with torch.autocast(setting.device.type, setting.dtype, enabled=enabled):
                return [model.encode_catalogue(states)]

        return Runnable(encode)

    floor = replace(shape, items=CATALOGUE).encoder_floors(torch.bfloat16.itemsize)["forward"]
    names = ("eager", *BACKENDS)
    return Workload(1, {name: partial(make, name) for name in names}, check, {"run": floor})


FULL, HALF = 1e-5, 2e-2  # relative errors of whole embeddings: many roundings of 2^-24, and of 2^-9


def _model(shape: Shape, backend: str, setting: Setting) -> CrossanModel:
    torch.manual_seed(0)
    return CrossanModel(shape.config(), backend=backend).to(setting.device).eval()


register(
    Case(
        name=f"evaluation/users={USERS},items={CATALOGUE},S={WINDOW}",
        build=partial(build_ranking, RECIPE, USERS),
        dtypes=("fp32",),
        tags=frozenset({"evaluation", "paper"}),
        importance=14,
    )
)
for shape in (RECIPE, Shape(items=0)):
    register(
        Case(
            name=f"encode_catalogue/items={CATALOGUE},M={shape.modalities},D={shape.width}",
            build=partial(build_catalogue, shape),
            tags=frozenset({"evaluation"}),
            importance=15,
        )
    )
