"""The plain deduplicate against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossan_fast.ops import deduplicate, deduplicate_reference
from crossan_fast.ops.deduplicate import deduplicate_without_waiting


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


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=5), st.integers(1, 12))
def test_without_waiting_it_gives_the_same(rows, capacity):
    """And of ids that do not fit, the largest ones become padding."""
    ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    kept = sorted({i for row in rows for i in row} - {0})[: capacity - 1]
    fitting = torch.where(torch.isin(ids, torch.tensor(kept, dtype=torch.int64)), ids, 0)
    expected = deduplicate_reference(fitting, capacity)
    found = deduplicate_without_waiting(ids, capacity)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: deduplicate(torch.tensor([1, 2]), 2), ValueError, r"capacity: 3 slots needed"),
        (
            lambda: deduplicate(torch.tensor([1, 2]), 0),
            ValueError,
            r"capacity: expected an integer from 1 to 2147483647, got 0",
        ),
        (
            lambda: deduplicate(torch.tensor([1.0])),
            TypeError,
            r"item_ids: expected a tensor of int64 or int32",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
