"""The plain in_batch_loss against sums written out one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

from crossan_fast.ops import (
    deduplicate,
    in_batch_loss,
    in_batch_loss_by_place,
    in_batch_loss_reference,
)


def sequences(batch, places, items):
    """Left-padded rows with repeats, within a row and across rows; one row has no target."""
    ids = torch.randint(1, items + 1, (batch, places))
    lengths = torch.randint(2, places + 1, (batch,))
    lengths[0] = 1
    ids[torch.arange(places) < places - lengths[:, None]] = 0
    return ids


def problem(batch=5, places=6, items=9, d=3):
    ids = sequences(batch, places, items)
    table = torch.randn(items + 1, d, dtype=torch.float64)
    users = torch.randn(batch, places - 1, d, dtype=torch.float64)
    popularity = torch.rand(items + 1, dtype=torch.float64) + 0.1
    return ids, table, users, popularity.log()


def in_batch_by_hand(ids, table, users, log_popularity):
    losses = []
    columns = [int(i) for row in ids for i in row if i != 0]
    for b, row in enumerate(ids.tolist()):
        for s in range(len(row) - 1):
            if row[s] == 0:
                continue

            def logit(item, b=b, s=s):
                return float(users[b, s] @ table[item] - log_popularity[item])

            others = [math.exp(logit(i)) for i in columns if i not in row]
            target = logit(row[s + 1])
            losses.append(-target + math.log(math.exp(target) + sum(others)))
    return sum(losses) / len(losses)


def test_equals_the_definition():
    ids, table, users, log_popularity = problem()
    want = in_batch_by_hand(ids, table, users, log_popularity)
    unique = deduplicate(ids)
    by_id = in_batch_loss_reference(
        users, table[unique.ids], unique.slots, unique.counts, log_popularity[unique.ids]
    )
    by_place = in_batch_loss_by_place(users, table[ids], ids, log_popularity[ids])
    assert float(by_id) == pytest.approx(want, rel=1e-12)
    assert float(by_place) == pytest.approx(want, rel=1e-12)


def test_unused_slots_change_nothing():
    ids, table, users, log_popularity = problem()
    tight, padded = deduplicate(ids), deduplicate(ids, 40)
    losses = [
        in_batch_loss_reference(users, table[u.ids], u.slots, u.counts, log_popularity[u.ids])
        for u in (tight, padded)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-14)


def test_no_row_with_a_target_gives_zero_and_finite_gradients():
    users = torch.randn(2, 3, 4, requires_grad=True)
    items = torch.randn(1, 4, requires_grad=True)
    slots = torch.zeros(2, 4, dtype=torch.int64)
    loss = in_batch_loss_reference(users, items, slots, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    loss.backward()
    assert loss.item() == 0
    assert users.grad.abs().sum() == 0 and items.grad.abs().sum() == 0


def test_gradients():
    ids, table, users, log_popularity = problem()
    unique = deduplicate(ids)

    def run(u, i):
        return in_batch_loss_reference(u, i, unique.slots, unique.counts, log_popularity[unique.ids])

    inputs = [users.requires_grad_(), table[unique.ids].requires_grad_()]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slots": torch.zeros(5, 5, dtype=torch.int64)}, ValueError, r"slots: expected \[B, S \+ 1\]"),
        ({"slots": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, r"slots: expected dtype int64"),
        ({"counts": torch.ones(3, dtype=torch.int64)}, ValueError, r"counts: expected an entry for each"),
        ({"items": torch.randn(9, 2).double()}, ValueError, r"items: expected shape \[\?, 3\]"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    ids, table, users, log_popularity = problem()
    unique = deduplicate(ids)
    arguments = {
        "users": users,
        "items": table[unique.ids],
        "slots": unique.slots,
        "counts": unique.counts,
        "log_popularity": log_popularity[unique.ids],
    }
    with pytest.raises(error, match=message):
        in_batch_loss(**{**arguments, **change})
