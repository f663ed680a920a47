"""The compiled topk_scores against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import library, needs_cpp
from scoring import RANKINGS, best_by_hand, no_numbers, ranking

from crossan_fast.ops.topk_scores import topk_scores, topk_scores_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", RANKINGS)
def test_best_items_equal_the_definition(sizes, dtype, k):
    users, items, _, exclude = ranking(*sizes, dtype)
    for excluded in (exclude, None):
        scores, ids = topk_scores(users, items, k, excluded, backend="cpp")
        expected_scores, expected_ids = topk_scores_reference(users, items, k, excluded)
        assert torch.equal(scores, expected_scores) and torch.equal(ids, expected_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("items", "k"), [(60, 1), (60, 60), (9000, 200)])
def test_a_score_that_is_no_number_is_never_among_the_best(items, k, dtype):
    users, table, exclude, _ = no_numbers(dtype, items)
    scores, ids = topk_scores(users, table, k, exclude, backend="cpp")
    assert ids.tolist() == best_by_hand(users, table, k, exclude)
    assert not scores.isnan().any() and (scores[:2] == float("-inf")).all()


def test_an_empty_catalogue_has_no_best_items():
    scores, ids = library().topk_scores(torch.randn(3, 4), torch.randn(1, 4), 2, None)
    assert (scores == float("-inf")).all() and not ids.any()


USERS, ITEMS = torch.randn(2, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.topk_scores(USERS, ITEMS, 0, None), "k: expected at least 1"),
        (lambda o: o.topk_scores(USERS, ITEMS, 1, torch.zeros(3, 1).long()), "exclude: expected"),
        (lambda o: o.topk_scores(USERS, ITEMS[:0], 1, None), "items: expected"),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(library())
