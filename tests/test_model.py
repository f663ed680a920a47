"""CrossanModel: docs/mathematics.md's checks on the definition, its equalities, its names and its errors."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast._losses import dropped
from crossan_fast._sources import Source

ITEMS, LEVELS = 15, 3
WIDTHS = {"text": 12, "image": 20}
IDS = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9], [0, 5, 1, 1, 2]])


def small(**overrides):
    modalities = [Modality(name, width, LEVELS) for name, width in WIDTHS.items()]
    values = {"bottleneck": 4, "embedding_dim": 8, "window": 4, "dropout": 0.0, **overrides}
    make = CrossanConfig.iisan if values.pop("iisan", False) else CrossanConfig
    return make(modalities, **values)


def make_cache(present=None):
    states = {name: torch.randn(ITEMS + 1, LEVELS, width) for name, width in WIDTHS.items()}
    for m, state in enumerate(states.values()):
        state[0] = 0
        if present is not None:
            state[~present[:, m]] = 0
    names = [f"item{i}" for i in range(1, ITEMS + 1)]
    return HiddenStateCache.from_tensors(states, present=present, item_names=names)


def make_model(config, seed=1):
    torch.manual_seed(seed)
    model = CrossanModel(config)
    model.set_popularity(torch.arange(ITEMS + 1))
    with torch.no_grad():  # gates away from 0, so that cross terms count
        for name, parameter in model.named_parameters():
            if ".gate" in name or ".cross." in name:
                parameter.normal_(std=0.2)
    return model


def some_missing():
    present = torch.rand(ITEMS + 1, 2) > 0.4
    present[:, 0] |= ~present.any(dim=1)
    present[0] = False
    return present


def test_iisan_at_paper_values_has_the_public_codes_parameters():
    config = CrossanConfig.iisan([Modality("image", 768, 7), Modality("text", 768, 7)])
    assert sum(p.numel() for p in CrossanModel(config).parameters()) == 4_113_877


def test_crossan_of_four_has_less_than_43_percent_of_iisan_of_four():
    four = [Modality(name, 768, 7) for name in ("text", "image", "video", "audio")]
    crossan, iisan = (
        sum(p.numel() for p in CrossanModel(config).parameters())
        for config in (CrossanConfig(four), CrossanConfig.iisan(four))
    )
    assert crossan < 0.43 * iisan


def test_closed_cross_gates_leave_iisans_intra_tower():
    cache = make_cache()
    crossan = CrossanModel(small(activation="relu"))
    iisan = CrossanModel(small(iisan=True))
    for name in WIDTHS:
        own = {k: v for k, v in crossan.towers[name].state_dict().items() if not k.startswith("cross")}
        iisan.towers[name].load_state_dict(own)
    states = cache.states("cpu")
    # Under the same heads; the pair's tower, which CROSSAN has not, keeps its own.
    heads = torch.nn.ModuleDict({**iisan.heads, **crossan.heads})
    for a, b in zip(crossan.towers.hidden(states, heads), iisan.towers.hidden(states, heads), strict=False):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(crossan.towers(states, heads), iisan.towers(states, heads)[:, :2])


def test_state_dict_names():
    state = CrossanModel(small(head="two")).state_dict()
    promised = """towers.text.down.weight towers.text.down.bias towers.text.up.weight towers.text.up.bias
    towers.text.gate towers.text.cross.image heads.text.weight heads.text.bias heads.text.inner.weight
    heads.text.inner.bias fusion.router.weight fusion.router.bias fusion.experts.w1 fusion.experts.b1
    fusion.experts.w2 fusion.experts.b2 sequence_encoder.position.weight item_popularity"""
    assert set(promised.split()) <= state.keys()
    shapes = {name: list(t.shape) for name, t in state.items() if name.startswith("heads.image.")}
    assert shapes == {
        "heads.image.weight": [8, 20],
        "heads.image.bias": [8],
        "heads.image.inner.weight": [20, 20],
        "heads.image.inner.bias": [20],
    }


def loss_and_gradients(model, **arguments):
    torch.manual_seed(7)
    model.zero_grad()
    out = model(IDS, **arguments)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def by_the_definition(model):
    """A model whose towers make h, to which its head's Linears are applied one after the other."""

    def forward(states, heads, *, present=None, backend, **rows):
        e = []
        for source, head, h in zip(
            model.towers.structure.sources,
            heads.values(),
            model.towers.hidden(states, heads, present=present, **rows),
            strict=True,
        ):
            layers = [head.inner, head] if hasattr(head, "inner") else [head]
            for layer in layers:
                h = F.linear(h, layer.weight, layer.bias)
            if present is not None:
                h = torch.where(present[:, list(source)].any(dim=1, keepdim=True), h, 0)
            e.append(h)
        return torch.stack(e, dim=1)

    model.towers.forward = forward
    return model


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize(
    "extra",
    [{"head": "one"}, {"head": "two"}, {"head": "two", "cross": "side"}, {"iisan": True}],
    ids=["one layer", "two layers", "two layers, side", "iisan"],
)
def test_heads_give_what_their_layers_do_to_the_last_h(extra, missing, backend):
    cache = make_cache(some_missing() if missing else None)
    model, other = (make_model(small(**extra)).double() for _ in range(2))
    assert any(key.endswith("inner.weight") for key in model.state_dict()) == (extra != {"head": "one"})
    model.backend = backend
    have, grads = loss_and_gradients(model, cache=cache)
    want, expected = loss_and_gradients(by_the_definition(other), cache=cache)
    real = IDS != 0
    torch.testing.assert_close(have.loss, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(have.item_embeddings[real], want.item_embeddings[real], rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["in_batch", "full"])
@pytest.mark.parametrize("missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize(
    "extra",
    [
        {"load_balance": 0.1, "modality_dropout": 0.3},
        {"cross": "side", "top_k": 1, "head": "two"},
        {"iisan": True},
    ],
    ids=["dropout", "side", "iisan"],
)
def test_deduplication_is_exact(loss, missing, extra):
    cache = make_cache(some_missing() if missing else None)
    results = []
    for deduplicate in (True, False):
        model = make_model(small(loss=loss, deduplicate=deduplicate, **extra)).double()
        results.append(loss_and_gradients(model, cache=cache))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-12)
    real = IDS != 0
    torch.testing.assert_close(a.item_embeddings[real], b.item_embeddings[real], rtol=1e-12, atol=1e-12)
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:
        torch.testing.assert_close(grads_a[name], grads_b[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
def test_dense_states_equal_the_cache(missing):
    cache = make_cache(some_missing() if missing else None)
    model = make_model(small()).double()
    states = {n: s.reshape(3, 5, *s.shape[1:]) for n, s in cache.gather(IDS.reshape(-1)).items()}
    present = cache.present[IDS] if missing else None
    a, grads_a = loss_and_gradients(model, cache=cache)
    b, grads_b = loss_and_gradients(model, states=states, present=present)
    torch.testing.assert_close(a.loss, b.loss)
    for name in grads_a:
        torch.testing.assert_close(grads_a[name], grads_b[name])


def test_encode_items_equals_the_catalogue():
    cache, model = make_cache(), make_model(small())
    ids = torch.tensor([4, 9, 4])
    rows = model.encode_items(cache.gather(ids))
    torch.testing.assert_close(rows, model.encode_catalogue(cache, batch_size=4)[ids])
    assert model.encode_catalogue(cache)[0].abs().sum() == 0


def test_an_absent_modality_adds_nothing():
    """What the states of an absent modality hold can't be seen in the embedding."""
    model = make_model(small(cross="backbone"))
    states = {name: torch.randn(4, LEVELS, width) for name, width in WIDTHS.items()}
    present = torch.tensor([[True, False]] * 4)
    a = model.encode_items(states, present)
    b = model.encode_items({**states, "image": torch.full_like(states["image"], 1e6)}, present)
    assert torch.equal(a, b)


def test_modality_dropout_never_drops_the_last():
    model = make_model(small(modality_dropout=0.9)).train()
    exists = torch.tensor([[False, False], [True, False], [False, True], *[[True, True]] * 200])
    kept = dropped(model, Source((), None, None, exists), torch.arange(len(exists))).present
    assert (kept <= exists).all() and kept[1:].any(dim=1).all() and not kept[0].any()
    assert 0 < (kept[3:].sum(1) == 2).float().mean() < 0.2
    assert torch.equal(dropped(model.eval(), exists, torch.arange(len(exists))), exists)


@pytest.mark.parametrize("head", ["one", "two"])
def test_autocast_is_near_fp32(head):
    cache, model = make_cache(), make_model(small(head=head))
    plain = model(IDS, cache=cache).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(IDS, cache=cache).loss
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(plain.item(), rel=2e-2)


def test_save_and_load(tmp_path):
    cache, model = make_cache(), make_model(small())
    model.save_pretrained(tmp_path / "saved")
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == names
    again = CrossanModel.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert torch.equal(model.eval()(IDS, cache=cache).loss, again.eval()(IDS, cache=cache).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 10**9}, r"blocks: the config says 10{9}, expected a size that the \d+ weights"),
        ({"embedding_dim": 2**30}, "embedding_dim: the config says"),
        ({"embedding_dim": 1024}, "size mismatch for heads.text.weight"),
        ({"bottleneck": 2**30}, "bottleneck: the config says"),
        ({"expert_expansion": 2**30}, "size mismatch for fusion.experts.w1"),
    ],
)
def test_a_config_costs_no_more_than_the_weights_beside_it(tmp_path, changes, message):
    make_model(small()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((ValueError, RuntimeError), match=message):
        CrossanModel.from_pretrained(tmp_path)


def test_a_loaded_model_is_its_own(tmp_path):
    model = make_model(small())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    again = CrossanModel.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected), "loading draws no random numbers"
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_leaf for p in again.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), again.state_dict()[name])


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    model = make_model(small())
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.heads["text"].weight.zero_()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def call(**changes):
    model = make_model(small(**changes.pop("config", {})))
    arguments = {"item_ids": IDS, "cache": make_cache(), **changes}
    return model(arguments.pop("item_ids"), **arguments)


def dense(**changes):
    states = {name: torch.randn(3, 5, LEVELS, width) for name, width in WIDTHS.items()}
    return call(cache=None, states={**states, **changes})


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: call(item_ids=IDS.float()),
            TypeError,
            r"item_ids: expected dtype int64, int32, got float32",
        ),
        (lambda: call(item_ids=IDS.to(torch.int16)), TypeError, r"item_ids: expected dtype int64, int32"),
        (lambda: call(item_ids=IDS[0]), ValueError, r"item_ids: expected shape \[\?, \?\], got int64 \[5\]"),
        (lambda: call(item_ids=IDS + 7), ValueError, r"item_ids: expected ids in 0 to 15, got 7 to 16"),
        (lambda: call(item_ids=-IDS), ValueError, r"item_ids: expected ids in 0 to 15, got -9 to 0"),
        (lambda: call(item_ids=IDS.repeat(1, 2)), ValueError, r"2 to window \+ 1 = 5 places"),
        (lambda: call(item_ids=IDS * 0), ValueError, r"item_ids: expected a row with a target, got none"),
        (lambda: call(item_ids=IDS[:0]), ValueError, r"item_ids: expected a row with a target, got none"),
        (lambda: call(item_ids=IDS.flip(1)), ValueError, r"item_ids: expected padding \(0\) on the left"),
        (lambda: call(cache=None), ValueError, r"states, cache, encoders: expected one of them, got none"),
        (lambda: call(present=torch.ones(3, 5, 2).bool()), ValueError, r"present: goes with states"),
        (lambda: dense(txt=torch.ones(1)), ValueError, r"unknown modality 'txt'; did you mean 'text'"),
        (
            lambda: dense(text=torch.ones(3, 5, LEVELS, 13)),
            ValueError,
            r"states\['text'\]: .*\[\?, \?, 3, 12\]",
        ),
        (
            lambda: dense(image=torch.ones(2, 5, LEVELS, 20)),
            ValueError,
            r"\[3, 5\] first as in states\['text'\]",
        ),
        (lambda: dense(text=torch.ones(3, 5, LEVELS, 12).int()), TypeError, r"expected a floating type"),
        (
            lambda: call(config={"loss": "full"}, cache=None, states={}),
            ValueError,
            r"expected a cache, got st",
        ),
        (lambda: call(cache="cache"), TypeError, r"cache: expected a HiddenStateCache, .* got 'cache'"),
        (lambda: make_model(small()).encode_catalogue("c"), TypeError, r"cache: expected a HiddenState"),
        (lambda: make_model(small()).encode_items([1]), TypeError, r"states: expected tensors by modality"),
        (lambda: make_model(small()).set_popularity(None), TypeError, r"counts: expected a Split, or \[I"),
        (
            lambda: make_model(small()).set_popularity([0, 1], "shop"),
            TypeError,
            r"catalogue: expected a Catalogue, got str 'shop'",
        ),
        (lambda: CrossanModel.from_iisan([1]), TypeError, r"state_dict: expected tensors by name, got list"),
        (lambda: CrossanModel({"modalities": []}), TypeError, r"config: expected CrossanConfig, got dict"),
        (lambda: CrossanModel(small(), backend="gpu"), ValueError, r"backend: expected one of"),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_a_mask_with_padding_behind_an_item_is_refused_as_such_ids_are():
    model = make_model(small())
    model.eval()
    items = torch.randn(3, 4, model.config.embedding_dim)
    left = torch.tensor([[False, False, True, True], [True, True, True, True], [False] * 4])
    assert model.encode_users(items, left)[0, -1].count_nonzero()
    holes = torch.tensor([[True, False, True, True]] * 3)
    for mask, row in ((left.flip(1), 0), (left.roll(1, 1).roll(1, 0), 1), (holes, 0)):
        message = rf"mask: expected padding \(False\) on the left only, .* got it after an item in row {row}"
        with pytest.raises(ValueError, match=message):
            model.encode_users(items, mask)
    assert model.encode_users(items[:, :0], left[:, :0]).shape[1] == 0


def test_missing_popularity_and_modalities_are_named():
    with pytest.raises(ValueError, match=r"needs set_popularity\(counts\) first"):
        CrossanModel(small())(IDS, cache=make_cache())
    model = make_model(small())
    for counts, message in (
        ([0, 0], r"at least one interaction"),
        ([0, -1, 2], r"finite counts of at least 0"),
        ([[1, 2]], r"counts: expected shape \[\?\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_popularity(counts)
    states = {"text": torch.randn(2, LEVELS, 12)}
    with pytest.raises(ValueError, match=r"states: expected \['text', 'image'\], \['image'\] missing"):
        model.encode_items(states)


def test_an_item_without_any_modality_is_named():
    model = make_model(small())
    states = {name: torch.randn(3, LEVELS, width) for name, width in WIDTHS.items()}
    present = torch.tensor([[True, True], [False, False], [True, False]])
    with pytest.raises(ValueError, match=r"present: item at row 1 has no modality at all"):
        model.encode_items(states, present)
    cached = some_missing()
    cached[5] = False
    with pytest.raises(ValueError, match=r"item 'item5' \(row 5\) has no modality at all"):
        model(IDS, cache=make_cache(cached))


def test_presence_is_that_of_the_models_own_modalities():
    """An item whose only modality the model does not read is named; the cache's order is not the model's."""
    cached = torch.ones(ITEMS + 1, 2, dtype=torch.bool)
    cached[0], cached[3] = False, torch.tensor([True, False])
    cache = make_cache(cached)
    image = make_model(CrossanConfig([Modality("image", 20, LEVELS)], bottleneck=4, window=4))
    with pytest.raises(ValueError, match=r"item 'item3' \(row 3\) has no modality .* one of \['image'\]"):
        image(IDS, cache=cache)
    text = make_model(CrossanConfig([Modality("text", 12, LEVELS)], bottleneck=4, window=4))
    assert torch.isfinite(text(IDS, cache=cache).loss)


def test_a_cache_of_other_shape_is_named():
    model = make_model(small())
    other = HiddenStateCache.from_tensors({"text": torch.zeros(ITEMS + 1, LEVELS, 12)})
    with pytest.raises(ValueError, match=r"cache: holds \['text'\], expected modality 'image'"):
        model(IDS, cache=other)
    wide = HiddenStateCache.from_tensors(
        {"text": torch.zeros(ITEMS + 1, LEVELS, 13), "image": torch.zeros(ITEMS + 1, LEVELS, 20)}
    )
    with pytest.raises(ValueError, match=r"cache: expected Modality\(name='text', width=12.*width=13"):
        model(IDS, cache=wide)


def test_popularity_is_a_share_and_floors_at_one_interaction():
    model = make_model(small())
    model.set_popularity([99, 6, 0, 2])
    torch.testing.assert_close(model.item_popularity, torch.tensor([1, 6 / 8, 1 / 8, 2 / 8]))
