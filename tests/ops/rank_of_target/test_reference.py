"""The plain rank_of_target against brute force; whole numbers, so that every comparison is exact."""

from __future__ import annotations

import pytest
import torch
from scoring import no_numbers, ranks_by_hand, whole_numbers

from crossan_fast.ops import _score_tiles as tiles
from crossan_fast.ops import rank_of_target, rank_of_target_reference


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("filtered", [False, True])
def test_rank_counts_ties_against_the_target(filtered):
    users, table, exclude, targets = whole_numbers()
    exclude[0, 0] = targets[0]  # IISAN's protocol: a repeated target can't be hit
    ranks = rank_of_target_reference(users, table, targets, exclude if filtered else None)
    for b in range(len(users)):
        scores = {j: float(users[b] @ table[j]) for j in range(1, len(table))}
        if filtered:
            scores.update({int(j): float("-inf") for j in exclude[b] if j != 0})
        t = int(targets[b])
        assert ranks[b] == 1 + sum(s >= scores[t] for j, s in scores.items() if j != t)
    if filtered:
        assert ranks[0] == len(table) - 1


@pytest.mark.usefixtures("tile")
def test_constant_scorer_gets_the_last_rank():
    ranks = rank_of_target_reference(torch.ones(3, 2), torch.ones(21, 2), torch.tensor([1, 10, 20]))
    assert ranks.tolist() == [20, 20, 20]


@pytest.mark.usefixtures("tile")
def test_a_score_that_is_no_number_ranks_last():
    users, table, exclude, targets = no_numbers()
    ranks = rank_of_target_reference(users, table, targets, exclude)
    assert ranks.tolist() == ranks_by_hand(users, table, targets, exclude)
    assert ranks[[0, 1, 4, 5]].tolist() == [len(table) - 1] * 4  # NaN in the user, or in the target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 129])
@pytest.mark.parametrize(("batch", "items"), [(1, 120), (7, 4097), (64, 301)])
def test_equal_embeddings_tie_wherever_they_stand(batch, items, width, dtype):
    users, table = torch.randn(batch, width).to(dtype), torch.randn(1, width).to(dtype).repeat(items + 1, 1)
    targets, exclude = torch.randint(2, items, (batch,)), torch.ones(batch, 1, dtype=torch.int64)
    assert (rank_of_target_reference(users, table, targets) == items).all()
    assert (rank_of_target_reference(users, table, targets, exclude) == items - 1).all()


def test_scores_are_rounded_once():
    users, table = torch.randn(50, 300).bfloat16(), torch.randn(200, 300).bfloat16()
    scores = tiles.dot_products(users, table)
    exact = users.double() @ table.double().T
    assert scores.dtype == torch.bfloat16
    assert ((scores.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rank_of_target(torch.ones(2, 2), torch.ones(3, 2), torch.tensor([1])),
            ValueError,
            r"targets: expected an id for each row of users",
        ),
        (
            lambda: rank_of_target(torch.ones(1, 2), torch.ones(3, 3), torch.tensor([1])),
            ValueError,
            r"items: expected shape \[\?, 2\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
