"""Ranking and deduplication against brute force; integer scores, so that every comparison is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossan_fast.ops import _score_tiles as tiles
from crossan_fast.ops import (
    deduplicate,
    deduplicate_reference,
    rank_of_target,
    rank_of_target_reference,
    topk_scores,
    topk_scores_reference,
)


@pytest.fixture(params=[4096, 7], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", request.param)


def problem(batch=6, items=40, d=3, history=5):
    users = torch.randint(-2, 3, (batch, d)).float()
    table = torch.randint(-2, 3, (items + 1, d)).float()
    exclude = torch.randint(0, items + 1, (batch, history))
    targets = torch.randint(1, items + 1, (batch,))
    return users, table, exclude, targets


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("filtered", [False, True])
def test_rank_counts_ties_against_the_target(filtered):
    users, table, exclude, targets = problem()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 129])
@pytest.mark.parametrize(("batch", "items"), [(1, 120), (7, 4097), (64, 301)])
def test_equal_embeddings_tie_wherever_they_stand(batch, items, width, dtype):
    users, table = torch.randn(batch, width).to(dtype), torch.randn(1, width).to(dtype).repeat(items + 1, 1)
    targets, exclude = torch.randint(2, items, (batch,)), torch.ones(batch, 1, dtype=torch.int64)
    assert (rank_of_target_reference(users, table, targets) == items).all()
    assert (rank_of_target_reference(users, table, targets, exclude) == items - 1).all()
    assert (topk_scores_reference(users, table, 9).ids == torch.arange(1, 10)).all()


def test_scores_are_rounded_once():
    users, table = torch.randn(50, 300).bfloat16(), torch.randn(200, 300).bfloat16()
    scores = tiles.dot_products(users, table)
    exact = users.double() @ table.double().T
    assert scores.dtype == torch.bfloat16
    assert ((scores.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("filtered", [False, True])
def test_topk_orders_ties_by_id(k, filtered):
    users, table, exclude, _ = problem()
    top = topk_scores_reference(users, table, k, exclude if filtered else None)
    assert top.ids.shape == top.scores.shape == (len(users), k)
    for b in range(len(users)):
        banned = set(exclude[b].tolist()) if filtered else set()
        pairs = [(float(users[b] @ table[j]), j) for j in range(1, len(table)) if j not in banned]
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
        found = [(s, i) for s, i in zip(top.scores[b].tolist(), top.ids[b].tolist(), strict=True) if i]
        assert found == pairs
        assert (top.scores[b, len(pairs) :] == float("-inf")).all()


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=5), st.integers(0, 4))
def test_deduplicate_gives_back_every_place(rows, spare):
    ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    distinct = sorted({i for row in rows for i in row} - {0})
    capacity = len(distinct) + 1 + spare
    unique = deduplicate_reference(ids, capacity)
    assert unique.ids.tolist() == [0, *distinct, *[0] * spare]
    assert torch.equal(unique.ids[unique.slots], ids)
    assert ((unique.slots == 0) == (ids == 0)).all()
    flat = ids.flatten().tolist()
    assert unique.counts.tolist() == [0, *(flat.count(i) for i in distinct), *[0] * spare]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: deduplicate(torch.tensor([1, 2]), 2), ValueError, r"capacity: 3 slots needed"),
        (lambda: deduplicate(torch.tensor([1, 2]), 0), ValueError, r"capacity: expected at least 1"),
        (lambda: deduplicate(torch.tensor([1.0])), TypeError, r"item_ids: expected int64 or int32"),
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
