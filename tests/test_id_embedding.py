"""id_embedding: one more expert of the fusion, or added behind it; absent where training saw nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.ops import FusionWeights, fusion_reference

WIDTHS, LEVELS, ITEMS = {"text": 12, "image": 20}, 3, 9
COLD = [4, 7]
IDS = torch.tensor([[0, 3, 2, 5], [1, 4, 5, 9], [0, 0, 7, 2]])


def make_cache(items=ITEMS):
    torch.manual_seed(3)
    states = {name: torch.randn(items + 1, LEVELS, width) for name, width in WIDTHS.items()}
    for state in states.values():
        state[0] = 0
    present = torch.rand(items + 1, 2) > 0.3
    present[:, 0] |= ~present.any(dim=1)
    present[0] = False
    return HiddenStateCache.from_tensors(
        states, present=present, item_names=[f"i{n}" for n in range(1, items + 1)]
    )


def make_model(cache, **values):
    torch.manual_seed(1)
    modalities = [Modality(name, width, LEVELS) for name, width in WIDTHS.items()]
    fields = {
        "bottleneck": 4,
        "embedding_dim": 8,
        "window": 3,
        "dropout": 0.0,
        "id_embedding": True,
        **values,
    }
    make = CrossanConfig.iisan if fields.pop("iisan", False) else CrossanConfig
    model = CrossanModel(make(modalities, **fields))
    counts = torch.arange(cache.num_items + 1) % 4 + 1
    counts[COLD] = 0
    model.set_popularity(counts, cache.catalogue)
    with torch.no_grad():
        model.id_embedding.weight.normal_()
    return model.double()


def towers_of(model, cache, rows):
    return model.towers(
        [s.double() for s in cache.states("cpu")], model.heads, ids=rows, present=cache.present[rows]
    )


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_momef_takes_ids_as_an_expert_behind_the_modalities(backend):
    cache = make_cache()
    model = make_model(cache)
    model.backend = backend
    rows = torch.arange(ITEMS + 1)
    table = model.id_embedding.weight
    seen = torch.tensor([row not in (0, *COLD) for row in rows.tolist()])
    assert torch.equal(model.id_embedding.seen, seen)
    embeddings = torch.cat([towers_of(model, cache, rows), table[:, None]], 1)
    present = torch.cat([cache.present, seen[:, None]], 1)
    router, experts = model.fusion.router, model.fusion.experts
    weights = (router.weight, router.bias, experts.w1, experts.b1, experts.w2, experts.b2)
    want = fusion_reference(embeddings, FusionWeights(*weights), present=present).items
    torch.testing.assert_close(model.encode_catalogue(cache)[1:], want[1:])
    found = model.explain(None, cache)
    assert found["expert"] == ["text", "image", "id"] and found["expert_weight"].shape == (ITEMS, 3)
    assert ((found["expert_weight"][:, 2] > 0) == seen[1:].numpy()).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    "values",
    [{}, {"top_k": 2}, {"fusion": "concat"}, {"iisan": True}, {"scores": "cosine", "temperature": 0.1}],
    ids=["momef", "top 2", "concat", "iisan", "cosine"],
)
def test_a_sum_adds_ids_to_what_the_fusion_makes(values, backend):
    """The model without ids, of the same weights, and a row added to each item that training saw."""
    cache = make_cache()
    model = make_model(cache, **values, id_fusion="sum")
    assert model.config.experts == ("text", "image")
    without = CrossanModel(replace(model.config, id_embedding=False, id_fusion="expert", scores="dot"))
    ids = {"id_embedding.weight", "id_embedding.seen"}
    without.double().load_state_dict({k: v for k, v in model.state_dict().items() if k not in ids})
    model.backend = without.backend = backend
    own = torch.where(model.id_embedding.seen[:, None], model.id_embedding.weight, 0)
    want = without.encode_catalogue(cache) + own
    if values.get("scores") == "cosine":
        want = torch.nn.functional.normalize(want, dim=1)
    torch.testing.assert_close(model.encode_catalogue(cache)[1:], want[1:])
    if model.config.fusion == "momef":
        found = model.explain(None, cache)
        assert found["expert"] == ["text", "image"]
        torch.testing.assert_close(
            torch.from_numpy(found["expert_weight"]),
            torch.from_numpy(without.explain(None, cache)["expert_weight"]),
        )


def test_a_sum_starts_where_the_model_without_ids_does_and_learns_at_once():
    cache = make_cache()
    model = CrossanModel(make_model(cache, id_fusion="sum").config)
    model.set_popularity(torch.arange(ITEMS + 1) % 4 + 1, cache.catalogue)
    assert not model.id_embedding.weight.any()
    _, grads = step(model, cache)
    assert torch.equal(grads["id_embedding.weight"].any(1), torch.isin(torch.arange(ITEMS + 1), IDS[IDS > 0]))


@pytest.mark.parametrize("values", [{"fusion": "concat"}, {"iisan": True}], ids=["concat", "iisan"])
def test_concat_takes_zeros_for_absent_ids(values):
    cache = make_cache()
    model = make_model(cache, **values)
    rows = torch.arange(ITEMS + 1)
    own = torch.where(model.id_embedding.seen[:, None], model.id_embedding.weight, 0)
    joined = torch.cat([towers_of(model, cache, rows).flatten(1), own], 1)
    want = torch.nn.functional.linear(joined, model.fusion.weight, model.fusion.bias)
    torch.testing.assert_close(model.encode_catalogue(cache)[1:], want[1:])


def step(model, cache, **arguments):
    torch.manual_seed(5)
    model.zero_grad()
    out = model(IDS, **(arguments or {"cache": cache}))
    out.loss.backward()
    return out.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "values",
    [{}, {"loss": "full"}, {"fusion": "concat"}, {"id_fusion": "sum"}, {"id_fusion": "sum", "loss": "full"}],
    ids=["in_batch", "full", "concat", "sum", "sum, full"],
)
def test_deduplication_is_exact_and_unseen_rows_get_no_gradient(values):
    cache = make_cache()
    one, other = (make_model(cache, **values, deduplicate=d) for d in (True, False))
    (loss, grads), (want, expected) = step(one, cache), step(other, cache)
    torch.testing.assert_close(loss, want)
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name])
    touched = grads["id_embedding.weight"].abs().sum(1) > 0
    read = one.id_embedding.seen if "loss" in values else torch.isin(torch.arange(ITEMS + 1), IDS)
    assert torch.equal(touched, read & one.id_embedding.seen)


@pytest.mark.parametrize("fusion", ["expert", "sum"])
def test_dense_states_of_a_batch_have_ids_and_those_of_items_where_they_are_given(fusion):
    cache = make_cache()
    model = make_model(cache, id_fusion=fusion)
    states = {name: cache.gather(IDS.flatten(), "cpu")[name].unflatten(0, IDS.shape) for name in WIDTHS}
    dense = {"states": states, "present": cache.present[IDS]}
    torch.testing.assert_close(step(model, cache)[0], step(model, cache, **dense)[0])
    rows = torch.arange(1, ITEMS + 1)
    flat, items = cache.gather(rows, "cpu"), model.encode_catalogue(cache)[1:]
    given = model.encode_items(flat, cache.present[rows], item_ids=rows)
    torch.testing.assert_close(given, items)
    without = model.encode_items(flat, cache.present[rows])
    alike = (without - items).abs().amax(1) < 1e-9
    assert torch.equal(alike, ~model.id_embedding.seen[1:])


@pytest.mark.parametrize("fusion", ["expert", "sum"])
def test_it_is_saved_and_new_rows_of_a_cache_do_without(tmp_path, fusion):
    cache, grown = make_cache(), make_cache(ITEMS + 3)
    model = make_model(cache, id_fusion=fusion).float()
    model.save_pretrained(tmp_path)
    loaded = CrossanModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    items = loaded.encode_catalogue(grown)
    rows = torch.arange(ITEMS + 1, ITEMS + 4)
    want = loaded.encode_items(grown.gather(rows, "cpu"), grown.present[rows])
    torch.testing.assert_close(items[rows], want)
    weight, old = loaded.id_embedding.weight, loaded.id_embedding.weight.detach().clone()
    loaded.set_popularity(torch.ones(ITEMS + 4), grown.catalogue)
    assert loaded.id_embedding.weight is weight and torch.equal(weight[: ITEMS + 1], old)
    assert weight.shape == (ITEMS + 4, 8) and loaded.id_embedding.seen[1:].all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("items", [1, 40, 400, -3])
def test_an_optimizer_goes_on_with_a_table_that_changes_its_size(items, fused):
    """Fused kernels trust shapes: moments of the old size were read beyond their end, and written."""
    model = make_model(make_cache())
    table = model.id_embedding
    optimizer = torch.optim.AdamW([table.weight], lr=0.1, weight_decay=0.0, fused=fused)

    def step(gradient):
        table.weight.grad = gradient.expand_as(table.weight).clone()
        optimizer.step()

    step(torch.tensor(1.0, dtype=torch.float64))
    moment = optimizer.state[table.weight]["exp_avg"].clone()
    before = table.weight.detach().clone()
    table.allocate(torch.ones(ITEMS + 1 + items, dtype=torch.bool))
    kept = min(len(before), len(table.weight))
    assert torch.equal(table.weight[:kept], before[:kept])
    step(torch.tensor(0.0, dtype=torch.float64))
    state = optimizer.state[table.weight]
    assert torch.equal(state["exp_avg"][:kept], 0.9 * moment[:kept]) and not state["exp_avg"][kept:].any()
    assert state["exp_avg_sq"].shape == table.weight.shape and table.weight.isfinite().all()
    # By hand: the second step of Adam behind a gradient of 1 and one of 0.
    moved = 0.1 * (0.09 / (1 - 0.9**2)) / ((0.000999 / (1 - 0.999**2)) ** 0.5 + 1e-8)
    torch.testing.assert_close(table.weight[:kept], before[:kept] - moved)


def test_rows_of_another_catalogue_are_refused():
    cache = make_cache()
    model = make_model(cache)
    states = {name: torch.zeros(ITEMS + 1, LEVELS, width) for name, width in WIDTHS.items()}
    other = HiddenStateCache.from_tensors(states, item_names=[f"j{n}" for n in range(1, ITEMS + 1)])
    for use in (model.encode_catalogue, lambda c: model.explain(None, c)):
        with pytest.raises(ValueError, match=r"id_embedding: its rows are of 9 items.*row 1 is 'i1' there"):
            use(other)
    model.set_popularity([1] * (ITEMS - 1))
    with pytest.raises(
        ValueError, match="id_embedding: expected a row for each of the cache's 9 items, got 7"
    ):
        model.encode_catalogue(cache)
    fresh = CrossanModel(model.config)
    with pytest.raises(ValueError, match=r"id_embedding: needs set_popularity\(counts\) first"):
        fresh(IDS, cache=cache)


def test_dropout_drops_added_ids_as_often():
    cache = make_cache()
    model = make_model(cache, modality_dropout=0.3, id_fusion="sum").train()
    found, added_to = [], model.id_embedding.added_to
    model.id_embedding.added_to = lambda fused, items: found.append(items) or added_to(fused, items)
    for _ in range(400):
        model(IDS, cache=cache)
    kept = (torch.stack(found) > 0).double().mean(0)
    assert kept[0] == 0 and ((kept[1:] - 0.7).abs() < 0.1).all()


def test_dropout_drops_ids_as_often_as_modalities():
    cache = make_cache()
    model = make_model(cache, modality_dropout=0.3).train()
    found = []
    model.id_embedding.register_forward_hook(lambda m, given, out: found.append(out[1]))
    for _ in range(400):
        model(IDS, cache=cache)
    ids = IDS.unique()
    kept = torch.stack(found)[:, :, 2].double().mean(0)
    assert not kept[~model.id_embedding.seen[ids]].any()
    assert ((kept[model.id_embedding.seen[ids]] - 0.7).abs() < 0.1).all()


def test_values_that_do_not_fit_are_named():
    text = Modality("text", 8, 2)
    model = make_model(cache := make_cache())
    states = cache.gather(torch.tensor([1, 2]), "cpu")
    with pytest.raises(ValueError, match="item_ids: expected integers of at least 0, got -1"):
        model.encode_items(states, item_ids=torch.tensor([1, -1]))
    with pytest.raises(TypeError, match="id_embedding: expected true or false, got 1"):
        CrossanConfig([text], id_embedding=1)
    with pytest.raises(ValueError, match=r"id_fusion: expected one of .*got 'add'"):
        CrossanConfig([text], id_embedding=True, id_fusion="add")
    with pytest.raises(ValueError, match="id_fusion: 'sum' goes with id_embedding=true, got false"):
        CrossanConfig([text], id_fusion="sum")
    with pytest.raises(ValueError, match="id_embedding: its expert is named 'id'"):
        CrossanConfig([text, Modality("id", 8, 2)], id_embedding=True)
    assert CrossanConfig([text], id_embedding=True, top_k=2).experts == ("text", "id")
    alone = CrossanConfig([text, Modality("id", 8, 2)], id_embedding=True, id_fusion="sum")
    assert alone.experts == ("text", "id")
    with pytest.raises(ValueError, match="top_k: expected at most the number of modalities, 1, got 2"):
        CrossanConfig([text], id_embedding=True, id_fusion="sum", top_k=2)
    with pytest.raises(
        ValueError, match="top_k: expected at most the number of modalities and ids, 2, got 3"
    ):
        CrossanConfig([text], id_embedding=True, top_k=3)
