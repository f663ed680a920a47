"""Deduplication without a host synchronisation against the plain reference."""

from __future__ import annotations

import os

import pytest
import torch

from crossan_fast.kernels import deduplicate
from crossan_fast.ops.deduplicate import deduplicate_reference

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape, spare", [((13, 8), 0), ((13, 8), 30), ((1,), 4), ((0, 3), 2), ((40,), 1)])
def test_matches_the_reference(shape, spare, dtype):
    generator = torch.Generator().manual_seed(len(shape) + spare)
    item_ids = torch.randint(0, 50, shape, generator=generator, dtype=dtype)
    capacity = len(deduplicate_reference(item_ids).ids) + spare
    actual = deduplicate.forward(item_ids.to(DEVICE), capacity)
    for out, expected in zip(actual, deduplicate_reference(item_ids, capacity), strict=True):
        assert out.dtype == torch.int64 and torch.equal(out.cpu(), expected)


def test_ids_that_do_not_fit_become_padding():
    ids, slots, counts = deduplicate.forward(torch.tensor([[7, 3, 9], [0, 9, 3]], device=DEVICE), 3)
    assert ids.tolist() == [0, 3, 7]
    assert slots.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert counts.tolist() == [0, 2, 1]


def test_strided_ids_and_opcheck():
    item_ids = torch.tensor([[4, 4, 0], [2, 9, 4]], device=DEVICE).T
    expected = deduplicate_reference(item_ids.cpu(), 6)
    for out, right in zip(deduplicate.forward(item_ids, 6), expected, strict=True):
        assert torch.equal(out.cpu(), right)
    torch.library.opcheck(torch.ops.crossan_fast.deduplicate.default, (item_ids, 6, "triton"))
