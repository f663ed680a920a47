"""Recommendations from Python: names, rows, unseen users and items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.recommend import Recommender

ITEMS = 9


def setup():
    config = CrossanConfig(
        [Modality("text", 6, 2)], embedding_dim=4, bottleneck=2, window=3, attention_heads=1
    )
    states = {"text": torch.cat([torch.zeros(1, 2, 6), torch.randn(ITEMS, 2, 6)])}
    names = [f"n{i}" for i in range(1, ITEMS + 1)]
    return CrossanModel(config), HiddenStateCache.from_tensors(states, item_names=names)


def test_scores_are_inner_products_in_order_and_leave_out_the_history():
    model, cache = setup()
    model.train()
    (found,) = model.recommend([["n2", "n5"]], cache, k=4)
    assert model.training
    model.eval()
    items = model.encode_catalogue(cache)
    history = torch.tensor([[0, 2, 5]])
    user = model.encode_users(items[history], history != 0)[0, -1].detach()
    scores = {i: float(items[i] @ user) for i in range(1, ITEMS + 1) if i not in (2, 5)}
    best = sorted(scores, key=lambda i: -scores[i])[:4]
    assert [r.item for r in found] == best
    assert [r.name for r in found] == [f"n{i}" for i in best]
    assert [r.score for r in found] == pytest.approx([scores[i] for i in best], rel=1e-5)


def test_names_and_rows_agree_and_long_histories_keep_their_end():
    model, cache = setup()
    by_name, by_row = model.recommend([["n1", "n2", "n3", "n4"], [1, 2, 3, 4]], cache, k=ITEMS)
    assert by_name == by_row
    assert len(by_name) == ITEMS - 4  # the history leaves fewer than k
    (unfiltered,) = model.recommend([["n1"]], cache, k=ITEMS, filter_history=False)
    assert len(unfiltered) == ITEMS
    assert model.recommend([], cache, k=1) == []


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[]], r"histories\[0\]: expected at least one"),
        (["n1"], r"histories\[0\]: expected at least one item name or row, got 'n1'"),
        ([[1], [10]], r"histories\[1\]: expected rows 1 to 9, got 10"),
        ([["n10"]], r"n10"),
        ([["n1", None]], r"histories\[0\]\[1\]: expected an item's name or row, got None"),
        ([[1], [2, 2.5]], r"histories\[1\]\[1\]: expected an item's name or row, got 2\.5"),
        ([[True]], r"histories\[0\]\[0\]: expected an item's name or row, got True"),
        ([None], r"histories\[0\]: expected at least one item name or row, got None"),
        ([b"\1\2"], r"histories\[0\]: expected at least one item name or row, got b'"),
    ],
)
def test_bad_histories_are_named(histories, message):
    model, cache = setup()
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        model.recommend(histories, cache, k=3)


def test_k_may_be_numpys():
    model, cache = setup()
    assert model.recommend([["n2"]], cache, k=np.int64(3)) == model.recommend([["n2"]], cache, k=3)


def test_allow_deny_and_what_is_left():
    model, cache = setup()
    everything = model.recommend([["n2"], ["n5", "n1"]], cache, k=ITEMS, filter_history=False)
    for allow, deny in ((["n1", 4, "n7"], None), (None, ["n1", 4]), (["n1", "n4", "n9"], ["n4"])):
        kept = {r.name for r in everything[0] if allow is None or r.name in allow or r.item in allow}
        kept -= {r.name for r in everything[0] if deny is not None and (r.name in deny or r.item in deny)}
        found = model.recommend(
            [["n2"], ["n5", "n1"]], cache, k=2, allow=allow, deny=deny, filter_history=False
        )
        for mine, whole in zip(found, everything, strict=True):
            expected = [r for r in whole if r.name in kept][:2]
            assert [(r.name, r.item) for r in mine] == [(r.name, r.item) for r in expected]
            assert [r.score for r in mine] == pytest.approx([r.score for r in expected])
    (found,) = model.recommend([["n1", "n2"]], cache, k=3, allow=["n1", "n2", "n3"])
    assert [r.name for r in found] == ["n3"], "the history leaves one of the three candidates"


def test_unknown_names_are_an_error_or_skipped():
    model, cache = setup()
    with pytest.raises(KeyError, match="n99"):
        model.recommend([["n1", "n99"]], cache, k=2)
    found = model.recommend([["n1", "n99"], ["nobody"], ["n1"]], cache, k=2, unknown="skip")
    assert found[0] == found[2] and found[1] == []
    recommender = Recommender(model, cache, unknown="skip", k=2, deny=["n5", "n98"])
    assert recommender.skipped == 1 and recommender.row("n99") == 0 and recommender.skipped == 2


def test_batches_are_as_one_by_one_and_frames_hold_the_same():
    pandas = pytest.importorskip("pandas", reason="needs pandas, of the extra `test`")
    model, cache = setup()
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, ITEMS + 1, size=size) for size in rng.integers(0, 6, size=40)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    recommender = Recommender(model, cache, k=4)
    seen = []
    for users, top in recommender.batches(np.concatenate(rows), offsets, batch_size=7):
        for user, items in zip(users.tolist(), top.ids.tolist(), strict=True):
            (alone,) = model.recommend([rows[user].tolist()], cache, k=4)
            assert [item for item in items if item] == [r.item for r in alone]
            seen.append(user)
    assert seen == [u for u, row in enumerate(rows) if len(row)]
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got -1"):
        list(recommender.batches(np.concatenate(rows), offsets, batch_size=-1))
    frame = model.recommend([["n1"], ["n2"]], cache, k=3).to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert frame["item"][3] == model.recommend([["n2"]], cache, k=1)[0][0].name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k: expected 1 to 9, the number of candidates, got 0"),
        ({"k": 10}, r"k: expected 1 to 9, the number of candidates, got 10"),
        ({"k": 3, "allow": ["n1", "n2"]}, r"k: expected 1 to 2, the number of candidates, got 3"),
        ({"allow": ["n1"], "deny": ["n1"]}, r"allow, deny: expected a candidate, got none"),
        ({"allow": "12", "k": 1}, r"allow: expected a list of item names or rows, got '12'"),
        ({"deny": "n1"}, r"deny: expected a list of item names or rows, got 'n1'"),
        ({"deny": [10]}, r"expected rows 1 to 9, got 10"),
        ({"unknown": "skp"}, r"unknown: expected one of .* got 'skp'; did you mean 'skip'"),
    ],
)
def test_bad_options_are_named(options, message):
    model, cache = setup()
    with pytest.raises(ValueError, match=message):
        model.recommend([["n1"]], cache, **options)


def test_a_string_of_letters_that_are_names_is_no_list_of_items():
    model, _ = setup()
    states = {"text": torch.cat([torch.zeros(1, 2, 6), torch.randn(3, 2, 6)])}
    cache = HiddenStateCache.from_tensors(states, item_names=["1", "2", "3"])
    for option in ("allow", "deny"):
        with pytest.raises(ValueError, match=f"{option}: expected a list of item names or rows, got '12'"):
            model.recommend([["3"]], cache, k=1, **{option: "12"})

    with pytest.raises(TypeError, match="names: expected a list of item names, got '12'"):
        cache.rows_of("12")
    with pytest.raises(TypeError, match="item_names: expected a list of names, got '123'"):
        HiddenStateCache.from_tensors(states, item_names="123")


def test_an_evaluations_filter_is_none_of_a_list():
    """`"none"` removed the history: it is not empty, and so was true."""
    model, cache = setup()
    for wrong in ("none", "all", None, 0):
        with pytest.raises(TypeError, match=f"filter_history: expected true or false, got {wrong!r}"):
            model.recommend([["n1"]], cache, filter_history=wrong)
    with pytest.raises(ValueError, match="allow: expected a list of item names or rows, got 3"):
        model.recommend([["n1"]], cache, allow=3)
    with pytest.raises(TypeError, match=r"cache: expected a HiddenStateCache, .* got 'cache'"):
        model.recommend([["n1"]], "cache")
    with pytest.raises(ValueError, match=r"offsets: expected places 0 to 1 of ids, got \[0 2\]"):
        Recommender(model, cache, k=1).rank(np.array([1]), np.array([0, 2]))


def test_histories_may_come_one_by_one():
    model, cache = setup()
    histories = [["n1"], ["n2", "n3"]]
    assert model.recommend(iter(histories), cache, k=2) == model.recommend(histories, cache, k=2)
    assert model.recommend((h for h in histories), cache, k=2)[1]


def test_embeddings_of_another_catalogue_are_refused():
    model, cache = setup()
    items = model.encode_catalogue(cache)
    ids, offsets = np.array([2, 5, 1]), np.array([0, 2, 3])
    want, have = (Recommender(model, cache, k=3, items=x).rank(ids, offsets) for x in (None, items))
    assert torch.equal(have.ids, want.ids) and torch.equal(have.scores, want.scores)
    for wrong in (items[:-1], torch.cat([items, items[-1:]]), items[:, :3], items[0]):
        with pytest.raises(ValueError, match=r"items: expected shape \[10, 4\], got float32"):
            Recommender(model, cache, k=3, items=wrong)
    with pytest.raises(TypeError, match=r"items: expected dtype float32, .* got int64"):
        Recommender(model, cache, k=3, items=items.long())
    with pytest.raises(ValueError, match=r"items: expected device cpu, got float32 .* on meta"):
        Recommender(model, cache, k=3, items=items.to("meta"))


def test_a_model_that_is_not_finite_does_not_rank():
    model, cache = setup()
    items = model.encode_catalogue(cache)
    items[3, 1] = float("nan")
    recommender = Recommender(model, cache, k=3, items=items)
    with pytest.raises(ValueError, match=r"model: the embedding of item 'n3' \(row 3\) is not finite"):
        recommender.rank(np.array([2]), np.array([0, 1]))
    with torch.no_grad():
        model.sequence_encoder.position.weight[-3] = float("nan")
    message = "model: the embedding of the user of history 1 is not finite"
    with pytest.raises(ValueError, match=message):
        model.recommend([["n1"], ["n1", "n2", "n3"], ["n2"]], cache, k=2)
    with torch.no_grad():
        model.heads["text"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model: the embedding of item 'n1' \(row 1\) is not finite"):
        model.recommend([["n1"]], cache, k=2)


def test_histories_of_rows_are_checked():
    """A negative row was counted from the end, and an empty history ranked."""
    model, cache = setup()
    recommender = Recommender(model, cache, k=2)
    for row in (-2, 0, ITEMS + 1):
        for ranked in (recommender.rank, lambda *rows: list(recommender.batches(*rows))):
            with pytest.raises(ValueError, match=f"ids: expected rows 1 to {ITEMS}, got {row}"):
                ranked(np.array([1, row]), np.array([0, 2]))
    with pytest.raises(ValueError, match="offsets: expected at least one item a history, got none in 1"):
        recommender.rank(np.array([1, 2]), np.array([0, 2, 2]))
    present = torch.ones(ITEMS + 1, 1, dtype=torch.bool)
    present[[0, 3]] = False
    states = {"text": cache.gather(torch.arange(ITEMS + 1))["text"] * present[:, :, None]}
    bare = HiddenStateCache.from_tensors(states, present, cache.item_names)
    with pytest.raises(ValueError, match=r"item 'n3' \(row 3\) has no modality at all"):
        Recommender(model, bare, k=2).rank(np.array([1, 3]), np.array([0, 2]))


def test_items_are_encoded_again_once_the_weights_have_changed():
    model, cache = setup()
    ids, offsets = np.array([2, 5]), np.array([0, 2])
    kept = Recommender(model, cache, k=4)
    given = Recommender(model, cache, k=4, items=model.encode_catalogue(cache))
    before = kept.rank(ids, offsets)
    assert kept.items is kept.items
    assert torch.equal(given.rank(ids, offsets).scores, before.scores)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    after, fresh = kept.rank(ids, offsets), Recommender(model, cache, k=4).rank(ids, offsets)
    assert not torch.equal(after.scores, before.scores)
    assert torch.equal(after.scores, fresh.scores)
    assert torch.equal(after.ids, fresh.ids)
    with pytest.raises(ValueError, match=r"items: expected a model .* got other weights since"):
        given.rank(ids, offsets)
