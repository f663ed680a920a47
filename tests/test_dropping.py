"""Modality dropout a whole history at a time: what it draws, and what a model makes of it."""

from __future__ import annotations

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, ops
from crossan_fast import _sources as sources
from crossan_fast._dropping import drop_by_history

LEVELS, ITEMS, P = 2, 9, 0.4
WIDTHS = {"text": 6, "image": 10, "sound": 6}
# One item in several histories, one twice in a history, padding.
IDS = torch.tensor([[0, 3, 2, 5], [3, 4, 3, 9], [0, 0, 7, 3], [2, 3, 5, 1]])


def make_cache():
    torch.manual_seed(3)
    states = {name: torch.randn(ITEMS + 1, LEVELS, width) for name, width in WIDTHS.items()}
    for state in states.values():
        state[0] = 0
    present = torch.rand(ITEMS + 1, 3) > 0.4
    present[:, 0] |= ~present.any(dim=1)
    present[0] = False
    names = [f"i{n}" for n in range(1, ITEMS + 1)]
    return HiddenStateCache.from_tensors(states, present=present, item_names=names)


def make_model(**values):
    torch.manual_seed(1)
    config = CrossanConfig(
        [Modality(name, width, LEVELS) for name, width in WIDTHS.items()],
        bottleneck=4,
        embedding_dim=8,
        window=3,
        dropout=0.0,
        **{"modality_dropout": P, "modality_dropout_scope": "history", "id_embedding": True, **values},
    )
    model = CrossanModel(config)
    model.set_popularity(torch.arange(ITEMS + 1))
    torch.nn.init.normal_(model.id_embedding.weight) if config.id_embedding else None
    return model.double().train()


def left_of(model, cache):
    """Of a draw: `[B, S, M]` what each place of a history has left, and `[B, S]` whether its id."""
    unique = ops.deduplicate(IDS)
    source = sources.cached(model.config, cache, torch.device("cpu"), unique.ids)
    pairs = drop_by_history(model.config, source, unique)
    return pairs.source.present[pairs.inputs], pairs.source.items[pairs.inputs] != 0, pairs


def test_a_history_shares_a_draw_which_no_last_modality_follows():
    cache, model = make_cache(), make_model()
    draws = [left_of(model, cache) for _ in range(1500)]
    held = cache.present[IDS[:, :-1]]
    real = IDS[:, :-1] != 0
    for left, ids, pairs in draws:
        assert not (left & ~held).any() and left.any(-1)[real].all()
        assert (pairs.counts.sum(), pairs.counts[0]) == ((IDS != 0).sum() + real.sum(), 0)
        candidates = pairs.source.present[pairs.candidates]
        assert torch.equal(candidates, cache.present[ops.deduplicate(IDS).ids])
        for b in range(len(IDS)):
            whole = real[b] & held[b].all(-1)
            assert len(left[b][whole].unique(dim=0)) <= 1 and len(ids[b][real[b]].unique()) == 1
    # Of an item of n modalities one stays where all would go, each as likely.
    left = torch.stack([d[0] for d in draws]).double().mean(0)
    n = held.sum(-1, keepdim=True).clamp_min(1)
    want = torch.where(held, 1 - P + P**n / n, 0)
    assert ((left - want).abs() < 0.06).all()
    assert ((torch.stack([d[1] for d in draws]).double().mean(0)[real] - (1 - P)).abs() < 0.06).all()


def by_hand(model, cache, pairs):
    """Users from each place of each history encoded by itself."""

    def encode(item, present, known):
        rows = torch.tensor([item])
        states = {name: state.double() for name, state in cache.gather(rows, "cpu").items()}
        return model.encode_items(states, present[None], item_ids=rows * known)[0]

    places = [
        [
            encode(i, pairs.source.present[k], int(pairs.source.items[k] != 0))
            if i
            else torch.zeros(8).double()
            for i, k in zip(row, slots, strict=True)
        ]
        for row, slots in zip(IDS[:, :-1].tolist(), pairs.inputs, strict=True)
    ]
    histories = torch.stack([torch.stack(row) for row in places])
    return model.encode_users(histories, IDS[:, :-1] != 0)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("loss", "fusion"), [("in_batch", "expert"), ("full", "expert"), ("in_batch", "sum")]
)
def test_a_step_equals_one_that_encodes_place_by_place(loss, fusion, backend):
    cache, model = make_cache(), make_model(loss=loss, id_fusion=fusion)
    model.backend = backend
    torch.manual_seed(11)
    out = model(IDS, cache=cache)
    torch.manual_seed(11)
    _, _, pairs = left_of(model, cache)
    users = by_hand(model, cache, pairs)
    torch.testing.assert_close(out.user_embeddings, users)
    items = model.eval()._encode_ids(cache, torch.arange(ITEMS + 1), None)
    if loss == "full":
        want = ops.full_loss(users, items, torch.where(IDS[:, :-1] != 0, IDS[:, 1:], 0))
    else:
        unique = ops.deduplicate(IDS)
        shares = torch.log(model.item_popularity[unique.ids])
        want = ops.in_batch_loss(users, items[unique.ids], unique.slots, unique.counts, shares)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.item_embeddings[IDS != 0], items[IDS[IDS != 0]])
    weights = list(model.parameters())
    found, truth = (
        torch.autograd.grad(x, weights, materialize_grads=True, allow_unused=True) for x in (out.loss, want)
    )
    for have, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(have, expected)


def test_rows_read_ahead_and_dense_states_give_the_same():
    cache, model = make_cache(), make_model()
    unique = ops.deduplicate(IDS)
    states = {name: cache.gather(IDS.flatten(), "cpu")[name].unflatten(0, IDS.shape) for name in WIDTHS}
    losses = []
    for arguments in (
        {"cache": cache},
        {"cache": cache, "gathered": cache.gather(unique.ids, "cpu")},
        {"states": states, "present": cache.present[IDS]},
    ):
        torch.manual_seed(4)
        losses.append(model(IDS, **arguments).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_without_dropping_a_draw_changes_nothing():
    cache = make_cache()
    model, plain = make_model(modality_dropout=1e-12), make_model(modality_dropout=0.0)
    torch.testing.assert_close(model(IDS, cache=cache).loss, plain(IDS, cache=cache).loss)
    assert torch.equal(model.eval()(IDS, cache=cache).loss, plain.eval()(IDS, cache=cache).loss)


def test_it_needs_distinct_items():
    with pytest.raises(ValueError, match="modality_dropout_scope: 'history' works on distinct items"):
        make_model(deduplicate=False)
    with pytest.raises(ValueError, match=r"modality_dropout_scope: expected one of \['item', 'history'\]"):
        make_model(modality_dropout_scope="user")
