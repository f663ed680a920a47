"""Recommendations from Python: names, rows, unseen users and items."""

from __future__ import annotations

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality

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
    by_name, by_row = model.recommend([["n1", "n2", "n3", "n4"], [1, 2, 3, 4]], cache, k=20)
    assert by_name == by_row
    assert len(by_name) == ITEMS - 4  # the catalogue ends before k
    (unfiltered,) = model.recommend([["n1"]], cache, k=20, filter_history=False)
    assert len(unfiltered) == ITEMS
    assert model.recommend([], cache) == []


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[]], r"histories\[0\]: expected at least one"),
        (["n1"], r"histories\[0\]: expected at least one item name or row, got 'n1'"),
        ([[1], [10]], r"histories\[1\]: expected rows 1 to 9, got 10"),
        ([["n10"]], r"n10"),
    ],
)
def test_bad_histories_are_named(histories, message):
    model, cache = setup()
    with pytest.raises((ValueError, KeyError), match=message):
        model.recommend(histories, cache)
