"""`model.check_finite`: the first tensor with NaN or inf, by name, in a loop of one's own."""

from __future__ import annotations

import math

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality

IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.fixture
def model() -> CrossanModel:
    config = CrossanConfig((Modality("text", 8, 2),), embedding_dim=8, bottleneck=4, window=4)
    model = CrossanModel(config, backend="eager")
    model.set_popularity(torch.ones(10))
    return model


@pytest.fixture
def cache() -> HiddenStateCache:
    states = torch.randn(10, 2, 8)
    states[0] = 0
    return HiddenStateCache.from_tensors({"text": states})


def test_a_sound_step_passes(model: CrossanModel, cache: HiddenStateCache) -> None:
    output = model(IDS, cache=cache)
    output.loss.backward()
    model.check_finite(output)
    model.check_finite()


def test_a_weight_is_named_before_what_follows_from_it(model: CrossanModel, cache: HiddenStateCache) -> None:
    with torch.no_grad():
        model.heads["text"].bias[3] = math.inf
    output = model(IDS, cache=cache)
    with pytest.raises(
        ValueError, match=r"^heads\.text\.bias: expected finite values, got inf at \[3\], in 1 of 8"
    ):
        model.check_finite(output)


def test_a_gradient_is_named(model: CrossanModel, cache: HiddenStateCache) -> None:
    output = model(IDS, cache=cache)
    output.loss.backward()
    model.towers["text"].gate.grad[1] = math.nan
    with pytest.raises(
        ValueError, match=r"^gradient of towers\.text\.gate: .* got nan at \[1\], in 1 of 2 places"
    ):
        model.check_finite(output)


def test_an_output_is_named(model: CrossanModel, cache: HiddenStateCache) -> None:
    output = model(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"^output\.loss: expected finite values, got nan at \[\]"):
        model.check_finite(output._replace(loss=output.loss * math.nan))
