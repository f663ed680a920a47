"""Weights as the ops read them: what a hook would compute before a forward is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from crossan_fast import CrossanConfig, CrossanModel, Modality
from crossan_fast.modules.fusion import folded, make_head
from crossan_fast.modules.linear import bias_of, own, weight_of


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and used
        nn.utils.weight_norm(module)


def of_ones_own(module: Any) -> None:
    module.original = module.weight
    del module.weight

    def halve(module: Any, inputs: Any) -> None:
        module.weight = module.original / 2

    module.register_forward_pre_hook(halve)
    halve(module, None)


HOOKED: dict[str, Callable[[Any], Any]] = {
    "SpectralNorm": nn.utils.spectral_norm,
    "WeightNorm": weight_norm,
    "RandomUnstructured": lambda module: prune.random_unstructured(module, "weight", amount=0.5),
    "halve": of_ones_own,
}


@pytest.mark.parametrize("hook", HOOKED)
def test_a_weight_that_a_hook_computes_is_refused(hook: str) -> None:
    apply, message = HOOKED[hook], f"module: expected 'weight' of a .*{hook}.*torch.nn.utils.parametrizations"
    linear, one, two = nn.Linear(4, 3), make_head(4, 3, False), make_head(4, 3, True)
    inner, norm = make_head(4, 3, True), nn.Embedding(3, 4)
    for module in (linear, one, two, inner.inner, norm):
        apply(module)
    calls: list[Callable[[], Any]] = [
        lambda: weight_of(linear),
        lambda: bias_of(linear),
        lambda: folded(one),
        lambda: folded(two),
        lambda: folded(inner),
        lambda: own(norm),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    "name",
    ["heads.text", "towers.text.down", "fusion.router", "sequence_encoder.blocks.0.attention.query"],
)
def test_a_model_with_a_part_under_the_old_spectral_norm_does_not_train(name: str) -> None:
    torch.manual_seed(0)
    model = CrossanModel(CrossanConfig([Modality("text", 8, 2)], embedding_dim=8, bottleneck=4, window=3))
    model.set_popularity(torch.ones(8))
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    states = {"text": torch.randn(8, 2, 8)[ids]}
    nn.utils.spectral_norm(model.get_submodule(name))
    with pytest.raises(TypeError, match=re.escape("(torch.nn.utils.spectral_norm.SpectralNorm)")):
        model(ids, states)


def test_a_parametrization_is_read_and_a_hook_that_looks_on_is_no_matter() -> None:
    torch.manual_seed(0)
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()
    assert torch.equal(weight_of(linear), linear.weight)
    assert torch.linalg.matrix_norm(weight_of(linear), 2).item() == pytest.approx(1, rel=1e-2)
    linear = nn.Linear(4, 3)
    linear.register_forward_pre_hook(lambda module, inputs: None)
    assert weight_of(linear) is linear.weight and bias_of(linear) is linear.bias
