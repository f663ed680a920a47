"""The compiled topk_scores against its definition."""

from __future__ import annotations

import subprocess
import sys

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


# Long lists of many users: 512 MiB of candidates, where each segment's 8,192 best wait for all others.
MEASURED = """
import resource, torch
from crossan_fast import ops
torch.manual_seed(0)
users, items = torch.randn(512, 4), torch.randn(8 * 8192 + 1, 4)
ops.topk_scores(users[:1], items[:100], 5, backend="cpp")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores, ids = ops.topk_scores(users, items, 8192, backend="cpp")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
wanted = (users[::101] @ items[1:].T).topk(8192).values
torch.testing.assert_close(scores[::101], wanted)
"""


def test_candidates_take_bounded_memory():
    """Beside the result's 48 MiB, and two workers' 16 MiB each."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300, "MiB"


@pytest.mark.parametrize("k", [3, 20_000])
def test_rounds_agree_with_one(k):
    """More segments than one round takes, with a last one of few items, and more users than a group."""
    users, items, _, exclude = ranking(70, 9 * 8192 + 5, 3, 4, torch.float64)
    scores, ids = topk_scores(users, items, k, exclude, backend="cpp")
    wanted = topk_scores_reference(users, items, k, exclude)
    assert torch.equal(scores, wanted.scores) and torch.equal(ids, wanted.ids)
