"""The plain topk_scores against brute force; whole numbers, so that every comparison is exact."""

from __future__ import annotations

import pytest
import torch
from scoring import best_by_hand, no_numbers, whole_numbers

from crossan_fast.ops import topk_scores, topk_scores_reference


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("filtered", [False, True])
def test_topk_orders_ties_by_id(k, filtered):
    users, table, exclude, _ = whole_numbers()
    top = topk_scores_reference(users, table, k, exclude if filtered else None)
    assert top.ids.shape == top.scores.shape == (len(users), min(k, len(table) - 1))
    for b in range(len(users)):
        banned = set(exclude[b].tolist()) if filtered else set()
        pairs = [(float(users[b] @ table[j]), j) for j in range(1, len(table)) if j not in banned]
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
        found = [(s, i) for s, i in zip(top.scores[b].tolist(), top.ids[b].tolist(), strict=True) if i]
        assert found == pairs
        assert (top.scores[b, len(pairs) :] == float("-inf")).all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("k", [1, 10, 120])
def test_a_score_that_is_no_number_is_never_among_the_best(k):
    users, table, exclude, _ = no_numbers()
    top = topk_scores_reference(users, table, k, exclude)
    assert top.ids.tolist() == best_by_hand(users, table, k, exclude)
    assert not top.scores.isnan().any() and (top.scores[:2] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 129])
@pytest.mark.parametrize(("batch", "items"), [(1, 120), (7, 4097), (64, 301)])
def test_equal_embeddings_come_by_id(batch, items, width, dtype):
    users, table = torch.randn(batch, width).to(dtype), torch.randn(1, width).to(dtype).repeat(items + 1, 1)
    assert (topk_scores_reference(users, table, 9).ids == torch.arange(1, 10)).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: topk_scores(torch.ones(1, 2), torch.ones(3, 2), 0),
            ValueError,
            r"k: expected an integer of at least 1, got 0",
        ),
        (
            lambda: topk_scores(torch.ones(1, 2), torch.ones(1, 2), 1),
            ValueError,
            r"items: expected a padding row and at least one item",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
