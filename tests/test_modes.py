"""Evaluation mode for a while: every part of a model goes back to the mode that it was in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast._modes import evaluating


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in model.named_modules()}


def make_model() -> CrossanModel:
    config = CrossanConfig([Modality("text", 6, 2)], embedding_dim=4, bottleneck=2, attention_heads=1)
    model = CrossanModel(config)
    model.train()
    model.sequence_encoder.eval()
    model.heads["text"].eval()
    return model


def test_a_part_that_was_in_evaluation_mode_stays_in_it() -> None:
    model = make_model()
    before = modes(model)
    states = {"text": torch.cat([torch.zeros(1, 2, 6), torch.randn(5, 2, 6)])}
    cache = HiddenStateCache.from_tensors(states, item_names=list("abcde"))
    model.recommend([["a", "b"]], cache, k=2)
    model.encode_catalogue(cache)
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(modes(model).values())
        raise ZeroDivisionError
    assert modes(model) == before
    model.eval().sequence_encoder.train()
    before = modes(model)
    model.encode_catalogue(cache)
    assert modes(model) == before


def test_a_grown_model_has_the_modes_of_the_one_it_was_made_of() -> None:
    model = make_model()
    grown, before = model.extend(Modality("image", 6, 2)), modes(model)
    assert {name: mode for name, mode in modes(grown).items() if name in before} == before
    assert grown.towers["image"].training and grown.heads["image"].training
    assert modes(grown.remove("image")) == modes(model)
