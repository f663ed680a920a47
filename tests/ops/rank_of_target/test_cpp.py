"""The compiled rank_of_target against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import library, needs_cpp, random
from scoring import RANKINGS, no_numbers, ranking, ranks_by_hand

from crossan_fast.ops.rank_of_target import rank_of_target, rank_of_target_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", RANKINGS)
def test_ranks_equal_the_definition(sizes, dtype):
    users, items, targets, exclude = ranking(*sizes, dtype)
    for excluded in (exclude, None):
        got = rank_of_target(users, items, targets, excluded, backend="cpp")
        assert torch.equal(got, rank_of_target_reference(users, items, targets, excluded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("items", [60, 9000])
def test_a_score_that_is_no_number_ranks_last(items, dtype):
    users, table, exclude, targets = no_numbers(dtype, items)
    nothing = torch.zeros_like(exclude)
    for excluded, given in ((exclude, exclude), (nothing, None)):
        got = rank_of_target(users, table, targets, given, backend="cpp")
        assert got.tolist() == ranks_by_hand(users, table, targets, excluded)


@pytest.mark.parametrize("width", [1, 5, 64, 129, 300])
def test_equal_embeddings_tie_exactly(width):
    users, one = random(3, width, dtype=torch.float32), random(1, width, seed=1, dtype=torch.float32)
    items = one.repeat(1001, 1)
    ranks = rank_of_target(users, items, torch.tensor([1, 500, 1000]), backend="cpp")
    assert ranks.tolist() == [1000] * 3


def test_strided_inputs_and_other_threads():
    users, items = (
        random(90, 40, dtype=torch.float32)[:, ::2],
        random(40, 3001, dtype=torch.float32).T[:, ::2],
    )
    targets, before = torch.arange(90) + 1, torch.get_num_threads()
    expected = rank_of_target(users.contiguous(), items.contiguous(), targets, backend="cpp")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(rank_of_target(users, items, targets, backend="cpp"), expected)
    finally:
        torch.set_num_threads(before)


USERS, ITEMS = torch.randn(2, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([1, 6]), None), r"targets: .*\[1, 6\), got 6"),
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([0, 1]), None), "got 0 at place 0"),
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([1]), None), "targets: expected shape"),
        (lambda o: o.rank_of_target(USERS, ITEMS[:, :3], torch.tensor([1, 1]), None), "items: expected"),
        (
            lambda o: o.rank_of_target(USERS, ITEMS.double(), torch.tensor([1, 1]), None),
            "items: expected dtype",
        ),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(library())
