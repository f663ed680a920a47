"""On a GPU: what the package makes for a step, an evaluation, a recommendation lies where the model does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.pretended_gpu import GPU, OnGpu, PretendedGpu
from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.cli.demo import popularity_metrics
from crossan_fast.data import Split, build_interactions, leave_one_out
from crossan_fast.recommend import recommend
from crossan_fast.training import Batches, OptimizerConfig, TrainStep, evaluate, make_optimizer
from crossan_fast.training.feed import feed

ITEMS, USERS, WINDOW, LEVELS = 30, 12, 4, 2
MODALITIES = (Modality("text", 6, LEVELS), Modality("image", 10, LEVELS))
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "eager")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield PretendedGpu()
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def make_cache(device: torch.device) -> HiddenStateCache:
    generator = torch.Generator(device="cpu").manual_seed(0)
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width, generator=generator) for m in MODALITIES}
    present = torch.rand(ITEMS + 1, 2, generator=generator) < 0.7
    present[:, 0] |= ~present.any(dim=1)
    present[0] = False
    for state, column in zip(states.values(), present.T, strict=True):
        state[~column] = 0
    return HiddenStateCache.from_tensors({name: s.to(device) for name, s in states.items()}, present)


def make_split(cache: HiddenStateCache) -> Split:
    generator = torch.Generator(device="cpu").manual_seed(1)
    ids = torch.randint(1, ITEMS + 1, (USERS, WINDOW + 3), generator=generator).tolist()
    users = {f"u{u}": [str(item) for item in row[u % 3 :]] for u, row in enumerate(ids)}
    return leave_one_out(build_interactions(users, cache.item_names, catalogue="all"), WINDOW)


def train(
    device: torch.device, **options: object
) -> tuple[CrossanModel, HiddenStateCache, Split, list[float]]:
    """Two epochs, and their losses."""
    torch.manual_seed(2)
    config = CrossanConfig(MODALITIES, bottleneck=4, embedding_dim=8, window=WINDOW, dropout=0.0, **options)
    model, cache, split = (
        CrossanModel(config).to(device),
        make_cache(device),
        make_split(make_cache(CPU)).to(device),
    )
    model.set_popularity(split.train_counts)
    settings = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    step = TrainStep(model, cache, make_optimizer(model, settings), settings)
    batches = Batches(split.train, 5, seed=0)
    losses = [
        float(step(item_ids, ahead))
        for epoch in (1, 2)
        for item_ids, ahead in feed(batches, epoch, cache, step.device)
    ]
    return model, cache, split, losses


OPTIONS = (
    {"load_balance": 0.1, "top_k": 1},
    {"loss": "full", "modality_dropout": 0.3},
    {"loss": "sampled", "negatives": 16, "negative_sampling": "popularity"},
    {"targets": "last", "label_smoothing": 0.1},
    {"deduplicate": False, "targets": "last"},
    {"deduplicate": False},
    {"architecture": "iisan", "cross": "none", "activation": "relu", "head": "two", "fusion": "concat"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_and_an_evaluation(gpu: PretendedGpu, options: dict[str, object]) -> None:
    """Everything on the GPU, and the numbers of the CPU."""
    model, cache, split, losses = train(CPU, **options)
    expected = evaluate(model, cache, split, k=(1, 5)).metrics
    with gpu:
        model, cache, split, given = train(GPU, **options)
        assert all(isinstance(p, OnGpu) and isinstance(p.grad, OnGpu | None) for p in model.parameters())
        assert cache.tier == "resident" and cache.device == GPU and split.train.device == GPU
        assert evaluate(model, cache, split, k=(1, 5)).metrics == pytest.approx(expected, rel=1e-6)
        everything = torch.arange(1, ITEMS + 1, device=GPU)
        for filter_history in ("all", "all_except_target", "none"):
            evaluate(
                model,
                cache,
                split,
                "validation",
                k=(1, 5),
                filter_history=filter_history,
                candidates=everything,
            )
        (found,) = recommend(model, [["3", "5"]], cache, k=4)
    assert len(found) == 4
    if not options.keys() & {"modality_dropout", "negatives"}:  # else drawn by another generator
        assert given == pytest.approx(losses, rel=1e-5)


def test_popularity_of_the_demo(gpu: PretendedGpu) -> None:
    expected = popularity_metrics(make_split(make_cache(CPU)))
    with gpu:
        assert popularity_metrics(make_split(make_cache(CPU)).to(GPU)) == expected


def test_a_split_elsewhere_is_named(gpu: PretendedGpu) -> None:
    with gpu:
        model, cache, _, _ = train(GPU)
        with pytest.raises(ValueError, match=r"split: expected device cuda:0 as the model, got .* on cpu"):
            evaluate(model, cache, make_split(make_cache(CPU)), k=(1, 5))
