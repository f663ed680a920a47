"""The compiled deduplicate against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import library, needs_cpp

from crossan_fast.ops.deduplicate import deduplicate, deduplicate_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("largest", [5, 63, 64, 5_000, 300_000, 2**31 - 1])
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (3, 0)])
def test_equals_the_definition(shape, largest, dtype):
    ids = torch.randint(0, largest, shape, dtype=dtype)
    ids.view(-1)[: 1 if shape == (5, 7) else 0] = largest
    for capacity in (None, ids.numel() + 1):
        expected = deduplicate_reference(ids, capacity)
        for x, y in zip(deduplicate(ids, capacity, backend="cpp"), expected, strict=True):
            assert torch.equal(x, y) and x.dtype == torch.int64


def test_takes_any_id():
    ids = torch.tensor([[2**62, 3], [0, 2**62]])
    assert [t.tolist() for t in deduplicate(ids, backend="cpp")] == [
        [0, 3, 2**62],
        [[2, 1], [0, 2]],
        [0, 1, 2],
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.deduplicate(torch.tensor([1, 2]), 2), "3 slots needed"),
        (lambda o: o.deduplicate(torch.tensor([-1]), 9), "got -1"),
        (lambda o: o.deduplicate(torch.tensor([1.0]), 9), "item_ids: expected dtype"),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(library())
