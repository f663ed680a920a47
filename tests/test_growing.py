"""One modality more, or fewer: a model starts where it was."""

from __future__ import annotations

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality

LEVELS, ITEMS = 2, 8
WIDTHS = {"text": 6, "image": 10, "sound": 6}
IDS = torch.tensor([[0, 3, 2, 5], [1, 4, 5, 8]])
CASES = [
    {},
    {"id_embedding": True},
    {"id_embedding": True, "id_fusion": "sum"},
    {"fusion": "concat", "id_embedding": True, "id_fusion": "sum"},
    {"fusion": "concat", "id_embedding": True},
    {"cross": "side"},
    {"iisan": True},
]


def make_cache(names):
    torch.manual_seed(3)
    states = {name: torch.randn(ITEMS + 1, LEVELS, width) for name, width in WIDTHS.items()}
    for state in states.values():
        state[0] = 0
    kept = {name: states[name] for name in names}
    return HiddenStateCache.from_tensors(kept, item_names=[f"i{n}" for n in range(1, ITEMS + 1)])


def make_model(names, **values):
    torch.manual_seed(1)
    modalities = [Modality(name, WIDTHS[name], LEVELS) for name in names]
    make = CrossanConfig.iisan if values.pop("iisan", False) else CrossanConfig
    model = CrossanModel(make(modalities, bottleneck=4, embedding_dim=8, window=3, dropout=0.0, **values))
    model.set_popularity(torch.arange(ITEMS + 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


@pytest.mark.parametrize("values", CASES, ids=str)
def test_an_extended_model_starts_where_it_was_and_trains_what_is_new(values):
    model = make_model(("text", "image"), **values)
    cache, wider = make_cache(("text", "image")), make_cache(WIDTHS)
    grown = model.extend(Modality("sound", 6, LEVELS), share=1e-7)
    assert grown.config.modality_names == ("text", "image", "sound")
    exact = {"rtol": 0, "atol": 0} if "fusion" in values or "iisan" in values else {"rtol": 0, "atol": 1e-5}
    if exact["atol"] == 0:  # zeros are added, in another order perhaps
        exact["atol"] = 1e-14
    torch.testing.assert_close(grown.encode_catalogue(wider), model.encode_catalogue(cache), **exact)
    want, out = model(IDS, cache=cache).loss, grown(IDS, cache=wider).loss
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    out.backward()
    for name, parameter in grown.named_parameters():
        old = name.startswith(("towers.", "heads.")) and name in dict(model.named_parameters())
        assert parameter.requires_grad is not old, name
        assert (parameter.grad is None) or not old, name
    assert grown.towers["sound"].down.weight.grad is not None
    grown.requires_grad_(True)
    assert not any(p is q for p in grown.parameters() for q in model.parameters())


def test_by_default_a_new_expert_has_a_hundredth():
    model, grown = (make_model(("text", "image")) for _ in range(2))
    cache, grown = make_cache(WIDTHS), grown.extend(Modality("sound", 6, LEVELS))
    assert (grown.explain(None, cache)["expert_weight"][:, 2] <= 0.01).all()
    assert (grown.explain(None, cache)["expert_weight"][:, 2] > 1e-4).all()
    want, have = model.encode_catalogue(make_cache(("text", "image"))), grown.encode_catalogue(cache)
    new = grown.remove("text").remove("image").encode_catalogue(make_cache(("sound",)))
    assert (have - want).abs().max() <= 0.01 * (want.abs().max() + new.abs().max())


@pytest.mark.parametrize("values", CASES[:-1], ids=str)
def test_a_smaller_model_is_what_the_model_is_on_items_that_lack_the_modality(values):
    model, cache = make_model(WIDTHS, **values), make_cache(WIDTHS)
    rows = torch.arange(1, ITEMS + 1)
    states = {name: state.double() for name, state in cache.gather(rows, "cpu").items()}
    present = torch.tensor([True, False, True]).expand(ITEMS, 3)
    smaller = model.remove("image")
    assert smaller.config.modality_names == ("text", "sound")
    want = model.encode_items(states, present, item_ids=rows)
    del states["image"]
    torch.testing.assert_close(smaller.encode_items(states, item_ids=rows), want)


def test_what_cannot_be_grown_is_named():
    model = make_model(("text", "image"))
    with pytest.raises(ValueError, match=r"name: expected one of \['text', 'image'\], got 'txt'"):
        model.remove("txt")
    with pytest.raises(ValueError, match=r"names must be distinct, \['text'\]"):
        model.extend(Modality("text", 6, LEVELS))
    with pytest.raises(ValueError, match="modalities: expected at least one Modality"):
        make_model(("text",)).remove("text")
    with pytest.raises(ValueError, match="top_k: an expert with next to no weight"):
        make_model(("text", "image"), top_k=1).extend(Modality("sound", 6, LEVELS))
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1, got 0"):
        model.extend(Modality("sound", 6, LEVELS), share=0)
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1, got 'x'"):
        model.extend(Modality("sound", 6, LEVELS), share="x")
    with pytest.raises(TypeError, match="modality: expected Modality, got str 'sound'"):
        model.extend("sound")
    with pytest.raises(ValueError, match=r"name: expected one of \['text', 'image'\], got 3"):
        model.remove(3)
    with pytest.raises(ValueError, match="towers of pairs"):
        make_model(("text", "image"), iisan=True).remove("text")
