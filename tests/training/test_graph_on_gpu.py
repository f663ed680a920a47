"""Captured steps on a GPU: what a recorder in the place of CUDA's graphs can't show (tests/test_step.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import judge
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast._sources import ReadAhead
from crossan_fast.training import OptimizerConfig, TrainStep, make_optimizer
from crossan_fast.training.graph import GraphedStep, refusal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ITEMS, LEVELS, WIDTH, PLACES, WARMUP = 300, 3, 64, 7, 2
MODALITIES = (Modality("text", WIDTH, LEVELS), Modality("image", WIDTH, LEVELS))
GPU = torch.device("cuda")


def make_cache(device: torch.device = GPU) -> HiddenStateCache:
    generator = torch.Generator().manual_seed(0)
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width, generator=generator) for m in MODALITIES}
    present = torch.rand(ITEMS + 1, 2, generator=generator) < 0.8
    present[:, 0] |= ~present.any(dim=1)
    present[0] = False
    for column, state in enumerate(states.values()):
        state[~present[:, column]] = 0
    return HiddenStateCache.from_tensors({name: s.to(device) for name, s in states.items()}, present)


def make_step(
    precision: Any = "fp32", backend: str = "auto", dtype: torch.dtype = torch.float32, **options: Any
) -> TrainStep:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"bottleneck": 16, "embedding_dim": 16, "window": PLACES - 1, "dropout": 0.0}
    config = CrossanConfig(MODALITIES, **{**sizes, **options})
    model = CrossanModel(config, backend=backend).to(GPU, dtype)
    model.set_popularity(torch.arange(ITEMS + 1))
    settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=6)
    return TrainStep(model, make_cache(), make_optimizer(model, settings), settings, precision)


def draw(rows: int, seed: int) -> Tensor:
    ids = torch.randint(1, ITEMS + 1, (rows, PLACES), generator=torch.Generator().manual_seed(seed))
    ids[: rows // 3, :3] = 0
    return ids.to(GPU)


def captured(step: TrainStep) -> GraphedStep:
    assert refusal(step) is None
    return GraphedStep(step, warmup=WARMUP)


def losses(run: Callable[[Tensor, ReadAhead], Tensor], batches: list[Tensor]) -> Tensor:
    ahead = ReadAhead(capacity=256)
    return torch.stack([run(item_ids, ahead) for item_ids in batches])


def set_rate(step: TrainStep, rate: float) -> None:
    step._rate_stands = True
    step.steps = 100  # past the warm-up
    for group in step.optimizer.param_groups:
        group["lr"].fill_(rate)


OPTIONS = (
    {},
    {"loss": "full"},
    {"targets": "last"},
    {"architecture": "iisan", "cross": "none", "fusion": "concat"},
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replays_are_the_eager_steps(precision: str, options: dict[str, Any]) -> None:
    """Two shapes in turn, the learning rate still rising: the same bits, or as near to float64 as torch."""
    batches = [draw(rows, seed) for seed in range(6) for rows in (24, 33)]
    graphed = captured(make_step(precision, **options))
    given = losses(graphed, batches)
    assert graphed.reason is None
    assert sum(entry.replay is not None for entry in graphed._entries.values()) == 2
    expected = losses(make_step(precision, **options), batches)
    if torch.equal(given, expected):
        return
    truth = losses(make_step(backend="eager", dtype=torch.float64, **options), batches)
    plain = losses(make_step(precision, backend="eager", **options), batches)
    judge("losses", given, [expected, plain], truth.double())


def test_a_replay_follows_the_learning_rate() -> None:
    step = make_step()
    graphed, batch = captured(step), draw(24, 0)
    losses(graphed, [batch] * (WARMUP + 2))
    weights = [p.detach().clone() for p in step.model.parameters()]
    set_rate(step, 0.0)
    losses(graphed, [batch] * 2)
    assert all(map(torch.equal, weights, step.model.parameters()))
    set_rate(step, 1e-2)
    losses(graphed, [batch])
    assert not all(map(torch.equal, weights, step.model.parameters()))


def test_replays_read_the_batch_they_are_given() -> None:
    step = make_step()
    graphed = captured(step)
    losses(graphed, [draw(24, 0)] * (WARMUP + 2))
    set_rate(step, 0.0)
    first, other = draw(24, 1), draw(24, 2)
    one, two, again = losses(graphed, [first, other, first])
    assert one != two and torch.equal(one, again)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"modality_dropout": 0.4}], ids=str)
def test_dropout_advances_with_every_replay(options: dict[str, Any]) -> None:
    step = make_step(**options)
    graphed, batch = captured(step), draw(24, 0)
    losses(graphed, [batch] * (WARMUP + 2))
    set_rate(step, 0.0)
    torch.manual_seed(3)
    drawn = losses(graphed, [batch] * 4)
    assert drawn.unique().numel() == 4, "each replay draws its own"
    torch.manual_seed(3)
    assert torch.equal(losses(graphed, [batch] * 4), drawn), "and the seed decides what"
