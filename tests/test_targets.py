"""Drawn negatives, and rows that predict their last item alone, against torch's cross entropy in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, ops
from crossan_fast._losses import last_alone

LEVELS, ITEMS = 2, 12
IDS = torch.tensor([[0, 3, 2, 5], [3, 4, 3, 9], [0, 0, 7, 3], [2, 3, 5, 1]])
DRAWS = torch.tensor([11, 3, 8, 11, 1, 11, 6, 3])


def make_cache(bare=()):
    torch.manual_seed(3)
    state = torch.randn(ITEMS + 1, LEVELS, 6)
    state[0] = 0
    present = torch.arange(ITEMS + 1)[:, None] > 0
    for row in bare:
        state[row], present[row] = 0, False
    names = [f"i{n}" for n in range(1, ITEMS + 1)]
    return HiddenStateCache.from_tensors({"text": state}, present=present, item_names=names)


def make_model(**values):
    torch.manual_seed(1)
    if values.get("loss") == "sampled":
        values = {"negatives": len(DRAWS), **values}
    values = {"dropout": 0.0, "window": 3, **values}
    config = CrossanConfig([Modality("text", 6, LEVELS)], bottleneck=4, embedding_dim=8, **values)
    model = CrossanModel(config)
    model.set_popularity(torch.arange(ITEMS + 1))
    return model.double()


def rows_of(targets):
    """(b, s) that predict the item behind them."""
    rows = ((IDS[:, :-1] != 0) & (IDS[:, 1:] != 0)).nonzero().tolist()
    return [(b, s) for b, s in rows if targets == "all" or s == IDS.shape[1] - 2]


def same_gradients(model, loss, want):
    torch.testing.assert_close(loss, want)
    weights = [p for p in model.parameters() if p.requires_grad]
    given = {"materialize_grads": True, "allow_unused": True}
    found, truth = (torch.autograd.grad(x, weights, **given) for x in (loss, want))
    for have, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(have, expected)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("loss", ["in_batch", "full", "sampled uniform", "sampled popularity"])
def test_losses_are_torch_s(loss, targets, smoothing, backend, monkeypatch):
    cache, (loss, *sampling) = make_cache(), loss.split()
    values = {"negative_sampling": sampling[0]} if sampling else {}
    model = make_model(loss=loss, targets=targets, label_smoothing=smoothing, **values)
    model.backend = backend
    monkeypatch.setattr(model._sampler, "ids", lambda *_: DRAWS)
    out = model(IDS, cache=cache)
    items = model._encode_ids(cache, torch.arange(ITEMS + 1), None)
    users = model.encode_users(items[IDS[:, :-1]], IDS[:, :-1] != 0)
    torch.testing.assert_close(out.user_embeddings, users)
    torch.testing.assert_close(out.item_embeddings, items[IDS])
    rows = []
    for b, s in rows_of(targets):
        target, own = int(IDS[b, s + 1]), set(IDS[b].tolist())
        drawn = {"in_batch": IDS.flatten().tolist(), "full": [], "sampled": DRAWS.tolist()}[loss]
        columns = torch.tensor([target, *(i for i in drawn if i and i not in own)])
        if loss == "full":
            columns = torch.tensor([target, *(i for i in range(1, ITEMS + 1) if i != target)])
        logits = items[columns] @ users[b, s]
        if loss == "in_batch" or sampling == ["popularity"]:
            logits = logits - torch.log(model.item_popularity[columns])
        rows.append(F.cross_entropy(logits[None], torch.tensor([0]), label_smoothing=smoothing))
    assert len(rows) == (9 if targets == "all" else 4)
    same_gradients(model, out.loss, torch.stack(rows).mean())


def test_by_place_agrees_on_the_last_item():
    cache = make_cache()
    placed, distinct = (make_model(targets="last", deduplicate=kind) for kind in (False, True))
    losses = [model(IDS, cache=cache).loss for model in (placed, distinct)]
    torch.testing.assert_close(*losses)
    given = {"materialize_grads": True, "allow_unused": True}
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()), **given)
        for loss, model in zip(losses, (placed, distinct), strict=True)
    ]
    for have, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(have, expected)


def test_what_a_row_holds_is_the_same_apart():
    users, slots = torch.randn(2, 3, 5), torch.tensor([[0, 4, 1, 2], [3, 1, 3, 2]])
    apart, spaced = last_alone(users, slots)
    assert spaced.tolist() == [[0, 0, 4, 0, 1, 2], [3, 0, 1, 0, 3, 2]]
    assert torch.equal(apart[:, -1], users[:, -1]) and not apart[:, :-1].any()
    apart, spaced = last_alone(users[:, :1], slots[:, :2])
    assert torch.equal(apart, users[:, :1]) and torch.equal(spaced, slots[:, :2])


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_draws_are_in_proportion_and_never_what_nothing_embeds(sampling):
    model, cache = (
        make_model(loss="sampled", negatives=200_000, negative_sampling=sampling),
        make_cache((4, 12)),
    )
    torch.manual_seed(0)
    found = torch.bincount(model._sampler.ids(model, cache, ITEMS, torch.device("cpu")), minlength=ITEMS + 1)
    weights = torch.arange(ITEMS + 1).double() if sampling == "popularity" else torch.ones(ITEMS + 1).double()
    weights[[0, 4, 12]] = 0
    share = weights / weights.sum()
    assert found[share == 0].sum() == 0 and found.sum() == 200_000
    off = (found - 200_000 * share) / (200_000 * share * (1 - share)).sqrt().clamp_min(1)
    assert off.abs().max() < 5, "standard deviations"


def test_a_draw_of_almost_one_is_the_last_item(monkeypatch):
    model, cache = make_model(loss="sampled", negatives=3), make_cache((12,))
    monkeypatch.setattr(torch, "rand", lambda *_, **given: torch.full((3,), 1 - 2**-53, dtype=given["dtype"]))
    assert model._sampler.ids(model, cache, ITEMS, torch.device("cpu")).tolist() == [11] * 3
    monkeypatch.setattr(torch, "rand", lambda *_, **given: torch.zeros(3, dtype=given["dtype"]))
    assert model._sampler.ids(model, cache, ITEMS, torch.device("cpu")).tolist() == [1] * 3


def test_bounds_follow_what_they_are_made_of():
    model, device = (
        make_model(loss="sampled", negatives=500, negative_sampling="popularity"),
        torch.device("cpu"),
    )
    caches = make_cache(), make_cache((12,))
    for cache, there in (*zip(caches, (True, False), strict=True), (caches[0], True)):
        assert (model._sampler.ids(model, cache, ITEMS, device) == 12).any() == there
    assert model._sampler.ids(model, caches[0], 5, device).max() == 5, "of a catalogue before it grew"
    counts = torch.ones(ITEMS + 1)
    counts[3] = 1e6
    model.set_popularity(counts)
    assert (model._sampler.ids(model, caches[0], ITEMS, device) == 3).all()
    assert copy.deepcopy(model)(IDS, cache=caches[0]).loss.isfinite()


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_a_step_with_draws_compiles_in_one_graph(sampling):
    model, cache = make_model(loss="sampled", negative_sampling=sampling), make_cache((12,))
    cache.warm(wait=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    once = torch.ones(ITEMS + 1)
    once[3] = 1e12
    for counts in (torch.arange(ITEMS + 1), once):  # a graph that is there already draws by the new ones
        model.set_popularity(counts)
        torch.manual_seed(0)
        loss = compiled(IDS, cache=cache).loss
        torch.manual_seed(0)
        same_gradients(model, loss, model(IDS, cache=cache).loss)


def test_tracing_says_what_it_cannot_look_up():
    compiled = torch.compile(make_model(loss="sampled"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"cache: which items have .* on cpu yet.*call cache\.present_mask"):
        compiled(IDS, cache=make_cache((12,)))


def test_many_draws_approach_the_full_softmax():
    """Uniform draws of every item alike: what sampling leaves out of the full loss is the row's own items."""
    cache, model = make_cache(), make_model(loss="sampled", negatives=400_000, targets="last")
    ids = torch.tensor([[0, 0, 3, 5], [0, 0, 4, 7]])
    torch.manual_seed(0)
    out = model(ids, cache=cache)
    items = model._encode_ids(cache, torch.arange(ITEMS + 1), None)
    losses = []
    for b, (own, target) in enumerate(((3, 5), (4, 7))):
        scores = (items @ out.user_embeddings[b, -1]).detach()
        others = [i for i in range(1, ITEMS + 1) if i not in (own, target)]
        losses.append(
            torch.logsumexp(scores[others], 0) + torch.tensor(400_000 / ITEMS).log() - scores[target]
        )
    torch.testing.assert_close(out.loss.detach(), torch.stack(losses).mean(), atol=5e-3, rtol=0)


def test_drawing_leaves_the_popularity_as_it_is():
    model, cache = make_model(loss="sampled", negative_sampling="popularity"), make_cache()
    before = model.item_popularity.clone()
    assert before.dtype == torch.float64 and before[0]
    assert model(IDS, cache=cache).loss.isfinite()
    assert torch.equal(model.item_popularity, before)


def test_dropout_by_history_and_ids_go_with_draws():
    cache = make_cache()
    model = make_model(
        loss="sampled", id_embedding=True, modality_dropout=0.5, modality_dropout_scope="history"
    ).train()
    for seed in range(5):
        torch.manual_seed(seed)
        loss = model(IDS, cache=cache).loss
        assert loss.isfinite() and loss > 0
    assert torch.autograd.grad(loss, model.id_embedding.weight)[0].any()


def test_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="loss: 'sampled' works on distinct items"):
        make_model(loss="sampled", deduplicate=False)
    with pytest.raises(ValueError, match="negatives: expected at least 1, got 0"):
        make_model(negatives=0)
    for values in ({"negatives": 50}, {"negative_sampling": "popularity"}):
        with pytest.raises(
            ValueError, match=r"negativ.*: loss='in_batch' draws none, expected loss='sampled'"
        ):
            make_model(**values)
    sampled, cache = make_model(loss="sampled"), make_cache()
    with pytest.raises(ValueError, match="gathered: goes with loss='in_batch'"):
        sampled(IDS, cache=cache, gathered=cache.gather(IDS.flatten()))
    with pytest.raises(ValueError, match=r"targets: expected one of \['all', 'last'\], got 'first'"):
        make_model(targets="first")
    model = make_model(loss="sampled", negative_sampling="popularity")
    with pytest.raises(ValueError, match="cache: loss='sampled' draws from the catalogue"):
        model(IDS, {"text": make_cache().gather(IDS.flatten())["text"].view(4, 4, LEVELS, 6)})
    model.item_popularity = torch.empty(0)
    with pytest.raises(ValueError, match="item_popularity: negative_sampling='popularity' needs"):
        model(IDS, cache=make_cache())


def test_no_column_is_no_loss():
    """Every draw is a row's own item: the target is alone, and says so by a loss of 0."""
    users, items = torch.randn(1, 2, 4), torch.randn(3, 4)
    slots, counts = torch.tensor([[0, 1, 2]]), torch.tensor([0, 2, 0])
    assert ops.in_batch_loss(users, items, slots, counts, torch.zeros(3)) == 0
