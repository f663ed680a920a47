"""The kernels that compare all places against the definition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from crossan_fast import ops as public
from crossan_fast.kernels import _common, deduplicate
from crossan_fast.ops._dispatch import Request
from crossan_fast.ops._triton import refuses
from crossan_fast.ops.deduplicate import deduplicate_reference, deduplicate_without_waiting


def check(item_ids, capacity, device, expected=None):
    expected = expected or deduplicate_reference(item_ids, capacity)
    found = deduplicate.forward(item_ids.to(device), capacity)
    for name, got, want in zip(("ids", "slots", "counts"), found, expected, strict=True):
        assert got.dtype == torch.int64 and torch.equal(got.cpu(), want), name


def batches():
    generator = torch.Generator().manual_seed(0)
    for shape, highest in (((64, 11), 300), ((7, 5), 4), ((3,), 9), ((1, 1), 2), ((2, 3, 4), 1 << 60)):
        yield torch.randint(0, highest, shape, generator=generator)
    yield torch.zeros(5, 3, dtype=torch.int64)
    yield torch.full((9, 17), 12)
    yield torch.arange(200).flip(0)
    yield torch.arange(1, 200)[:, None]
    yield torch.zeros(0, 4, dtype=torch.int64)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("spare", [0, 300, pytest.param(1, marks=pytest.mark.long)])
def test_matches_the_definition(device, spare):
    for item_ids in batches():
        check(item_ids, item_ids.numel() + 1 + spare, device)
        tight = int((item_ids.unique() > 0).sum()) + 1
        check(item_ids, tight, device)


def test_int32_and_views(device):
    item_ids = torch.randint(0, 40, (12, 20))
    check(item_ids.int(), 41, device)
    check(item_ids.T[::2], 41, device)


@pytest.mark.parametrize("capacity", [1, 2, 17])
def test_ids_beyond_the_capacity_become_padding(device, capacity):
    item_ids = torch.randint(0, 50, (9, 11), generator=torch.Generator().manual_seed(1))
    expected = deduplicate_without_waiting(item_ids, capacity)
    assert (expected.slots == 0).sum() > (item_ids == 0).sum()
    check(item_ids, capacity, device, expected)


def test_where_the_interpreter_runs_it_they_are_refused_as_by_any_backend_of_the_cpu(device):
    if torch.device(device).type != "cpu":
        pytest.skip("a GPU would have to be asked how many ids there are")
    item_ids = torch.tensor([[6, 0, 2, 2], [2, 8, 6, 3], [6, 1, 1, 7]])
    with pytest.raises(ValueError, match="capacity: 7 slots needed"):
        public.deduplicate(item_ids, 3, backend="triton")
    found = public.deduplicate(item_ids, 7, backend="triton")
    assert torch.equal(found.ids, torch.tensor([0, 1, 2, 3, 6, 7, 8]))


def test_more_places_than_are_compared_are_sorted(device, monkeypatch):
    monkeypatch.setattr(deduplicate, "launch", None)
    check(torch.randint(0, 900, (deduplicate.MOST + 1,)), 1000, device)
    check(torch.randint(0, 900, (10,)), deduplicate.MOST + 1, device)


def test_registered_op_passes_opcheck(device):
    item_ids = torch.randint(0, 9, (4, 3), device=device)
    torch.library.opcheck(torch.ops.crossan_fast.deduplicate.default, (item_ids, 13, "triton"))


def test_a_model_on_a_gpu_runs_it():
    with mock.patch.object(_common, "refuses_device", lambda device: None):
        assert refuses(Request("deduplicate", "cuda", torch.int64)) is None
        assert "float64" in refuses(Request("deduplicate", "cuda", torch.float64))
