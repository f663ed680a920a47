"""`CrossanModel.explain`: gates and expert weights against what the model itself makes of items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality

MODALITIES = (Modality("text", 8, 3), Modality("image", 12, 3), Modality("sound", 8, 3))
ITEMS = 9


def make(**fields: object) -> tuple[CrossanModel, HiddenStateCache]:
    """A model with random gates and router, and a cache in which item 2 lacks its image."""
    states = {m.name: torch.randn(ITEMS + 1, m.levels, m.width) for m in reversed(MODALITIES)}
    for state in states.values():
        state[0] = 0
    present = torch.ones(ITEMS + 1, 3, dtype=torch.bool)
    present[0] = False
    present[2, 1] = False
    states["image"][2] = 0
    names = [f"item{i}" for i in range(1, ITEMS + 1)]
    cache = HiddenStateCache.from_tensors(states, present, names)
    model = CrossanModel(CrossanConfig(MODALITIES, embedding_dim=6, bottleneck=4, **fields), backend="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate" in name or ".cross." in name or "router" in name:
                parameter.normal_(std=0.3)
    return model, cache


@pytest.mark.parametrize("top_k", [None, 2])
def test_expert_weights_are_those_of_the_fusion(top_k: int | None) -> None:
    """The embedding of an item is the weighted sum of its experts, by the weights that are told."""
    model, cache = make(top_k=top_k)
    found = model.explain(None, cache)
    weights = torch.from_numpy(found["expert_weight"])
    assert found["item"] == [f"item{i}" for i in range(1, ITEMS + 1)]
    assert found["modality"] == ["text", "image", "sound"]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(ITEMS))
    assert weights[1, 1] == 0 and not found["present"][1, 1] and found["present"].sum() == 3 * ITEMS - 1
    assert ((weights > 0).sum(dim=1) == torch.tensor([top_k or 3, 2] + [top_k or 3] * 7)).all()
    # Of a model whose experts give the constants 1, 2 and 3, items are the mean of these by the weights.
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.zero_(), head.bias.zero_()
        model.fusion.experts.w2.zero_()
        model.fusion.experts.b2.copy_(torch.arange(1.0, 4.0)[:, None].expand(3, 6))
        model.fusion.router.bias.copy_(torch.tensor([0.3, 0.1, -0.2]))
    weights = torch.from_numpy(model.explain(None, cache)["expert_weight"])
    items = model.encode_catalogue(cache)[1:]
    torch.testing.assert_close(items, (weights @ torch.arange(1.0, 4.0))[:, None].expand(-1, 6))


def test_gates_and_shares_are_what_a_tower_passes() -> None:
    """With adapters and cross terms shut, the last h is the sum of the levels' states by their shares."""
    model, cache = make(cross="none")
    with torch.no_grad():
        for tower in model.towers.values():
            tower.up.weight.zero_()
    found = model.explain(["item3"], cache)
    gate = torch.sigmoid(model.towers["image"].gate / 0.1)
    np.testing.assert_allclose(found["gate"][1], gate.detach().numpy(), rtol=1e-6)
    states = cache.gather(torch.tensor([3]), "cpu")
    hidden = model.towers.hidden([states[m.name] for m in MODALITIES], model.heads)
    for m, modality in enumerate(MODALITIES):
        expected = torch.einsum("l,ld->d", torch.from_numpy(found["share"][m]), states[modality.name][0])
        torch.testing.assert_close(hidden[m][0], expected)
    assert found["cross_gate"] == {}


def test_cross_gates_are_named_by_receiver_and_sender() -> None:
    model, cache = make()
    found = model.explain([3, "item1"], cache)
    assert found["item"] == ["item3", "item1"]
    assert len(found["cross_gate"]) == 6
    expected = torch.tanh(model.towers["text"].cross["sound"]).detach().numpy()
    np.testing.assert_array_equal(found["cross_gate"]["text", "sound"], expected)


def test_iisan_has_towers_of_pairs_and_no_experts() -> None:
    _, cache = make()
    model = CrossanModel(CrossanConfig.iisan(MODALITIES, embedding_dim=6, bottleneck=4), backend="eager")
    found = model.explain(["item1"], cache)
    assert found["expert_weight"] is None
    assert found["gate"].shape == (6, 3) and found["share"].shape == (3, 3)
    assert found["tower"][3:] == ["text+image", "text+sound", "image+sound"]


def test_wrong_items_are_named() -> None:
    model, cache = make()
    with pytest.raises(KeyError, match="itme1"):
        model.explain(["itme1"], cache)
    with pytest.raises(IndexError, match="items: expected rows 1 to 9, got 10"):
        model.explain([10], cache)
    for empty in ([], "item1"):
        with pytest.raises(ValueError, match="items: expected at least one"):
            model.explain(empty, cache)
