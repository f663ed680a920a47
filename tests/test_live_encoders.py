"""`model(item_ids, encoders=…)`: encoders that run in the loop give what a cache of their states would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast._sources import from_encoders

ITEMS, LEVELS = 12, 3
WIDTHS = {"text": 10, "image": 6}
IDS = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9]])


class Encoder(nn.Module):
    """A frozen table of hidden states behind a Linear, which notes what it was asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.asked = name, list[Tensor]()
        torch.manual_seed(len(name))
        self.inputs = torch.randn(ITEMS + 1, LEVELS, 4)
        self.linear = nn.Linear(4, WIDTHS[name])

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        self.asked.append(ids)
        assert not torch.is_grad_enabled()
        return {self.name: self.linear(self.inputs[ids])}


def make(**changes: Any) -> tuple[CrossanModel, list[Encoder], HiddenStateCache]:
    encoders = [Encoder(name) for name in WIDTHS]
    with torch.no_grad():
        states = {e.name: e.linear(e.inputs) for e in encoders}
    for state in states.values():
        state[0] = 0
    modalities = [Modality(name, width, LEVELS) for name, width in WIDTHS.items()]
    options = {"bottleneck": 4, "embedding_dim": 8, "window": 4, "dropout": 0.0, **changes}
    torch.manual_seed(1)
    model = CrossanModel(CrossanConfig(modalities, **options))
    model.set_popularity(torch.arange(ITEMS + 1))
    return model, encoders, HiddenStateCache.from_tensors(states)


@pytest.mark.parametrize(
    "changes", [{}, {"deduplicate": False}, {"id_embedding": True}, {"fusion": "concat"}]
)
def test_a_step_is_that_of_a_cache_of_their_states(changes: dict[str, Any]) -> None:
    model, encoders, cache = make(**changes)
    expected = model(IDS, cache=cache)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = model(IDS, encoders=encoders)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)
    for encoder in encoders:  # once, each item once; nothing of them is trained
        (asked,) = encoder.asked
        assert asked.tolist() == [0, 1, 2, 3, 4, 5, 9]
        assert all(p.grad is None for p in encoder.parameters())


def test_what_it_holds_at_the_padding_does_not_matter() -> None:
    model, encoders, _ = make()
    first = model(IDS, encoders=encoders).loss
    for encoder in encoders:
        encoder.inputs[0] = 1e4
    assert torch.equal(model(IDS, encoders=encoders).loss, first)


def gives(states: Any) -> Callable[[Tensor], Mapping[str, Tensor]]:
    return lambda ids: states


TEXT, IMAGE = torch.randn(7, LEVELS, 10), torch.randn(7, LEVELS, 6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, r"encoders: expected one that gives \['text', 'image'\], got states of \[\]"),
        ([gives({"text": TEXT})], ValueError, r"encoders: expected one that gives \['image'\], got .*text"),
        ([gives({"text": TEXT})] * 2, ValueError, r"encoders\[1\]: gave \['text'\], which one before"),
        ([gives(TEXT)], TypeError, r"encoders\[0\]: expected states by modality name, got Tensor"),
        (
            [gives({"text": TEXT[:6], "image": IMAGE[:6]})],
            ValueError,
            "encoders: states of 'text': expected a row for each of 7 ids on cpu, got .*6, 3, 10",
        ),
        ([gives({"text": TEXT[..., :9], "image": IMAGE})], ValueError, r"states\['text'\]: .*3, 10\]"),
        (
            [gives({"text": TEXT, "image": IMAGE.clone().index_fill_(0, torch.tensor(6), torch.nan)})],
            ValueError,
            r"states\['image'\]: expected finite values.* that of item 9, level 0",
        ),
        ("text", TypeError, "encoders: expected a list of functions"),
        ({"text": gives({})}, TypeError, "encoders: expected a list of functions"),
        ([TEXT], TypeError, "encoders: expected a list of functions"),
        (gives({}), TypeError, "encoders: expected a list of functions .*, got function"),
        (nn.Sequential(nn.ReLU()), TypeError, "encoders: expected a list of functions .*, got Sequential"),
    ],
)
def test_what_does_not_fit_is_named(given: Any, error: type[Exception], message: str) -> None:
    model, _, _ = make()
    with pytest.raises(error, match=message):
        model(IDS, encoders=given)


def test_one_source_alone_and_one_loss() -> None:
    model, encoders, cache = make()
    with pytest.raises(
        ValueError, match="states, cache, encoders: expected one of them, got cache and encoders"
    ):
        model(IDS, cache=cache, encoders=encoders)
    with pytest.raises(ValueError, match="present: goes with states"):
        model(IDS, encoders=encoders, present=torch.ones(2, 5, 2, dtype=torch.bool))
    for loss in ("full", "sampled"):
        model, encoders, _ = make(loss=loss)
        with pytest.raises(ValueError, match=f"encoders: go with loss='in_batch', .*got '{loss}'"):
            model(IDS, encoders=encoders)


def test_what_an_encoder_does_to_its_arguments_and_modes_does_not_matter() -> None:
    model, encoders, _ = make()
    expected = model(IDS, encoders=encoders).loss

    def in_place(ids: Tensor) -> dict[str, Tensor]:
        found = encoders[0](ids)
        ids.zero_()
        return found

    @torch.inference_mode()
    def inferring(ids: Tensor) -> dict[str, Tensor]:
        return encoders[1](ids)

    loss = model(IDS, encoders=[in_place, inferring]).loss
    loss.backward()
    assert torch.equal(loss, expected)

    def following(ids: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            return {"text": encoders[0].linear(encoders[0].inputs[ids])}

    model(IDS, encoders=[following, encoders[1]]).loss.backward()
    assert all(p.grad is None for p in encoders[0].parameters())


def test_slots_behind_the_distinct_items_are_not_encoded() -> None:
    """As on a GPU, where a batch has a slot for every place."""
    model, encoders, _ = make()
    ids = torch.tensor([0, 1, 4, 9, 0, 0, 0])
    found = from_encoders(model.config, encoders, ids)
    assert encoders[0].asked[0].tolist() == [0, 1, 4, 9]
    items = model._encode(found, None)[0]
    assert items.shape == (7, 8)
    with torch.no_grad():
        full = model.encode_items({**encoders[0](ids[:4]), **encoders[1](ids[:4])})
    torch.testing.assert_close(items[:4], full, rtol=1e-6, atol=1e-6)
