import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossan_fast.ops.deduplicate import deduplicate_reference


def _check(ops, item_ids, capacity):
    expected = deduplicate_reference(item_ids, capacity)
    for got, want in zip(ops.deduplicate(item_ids, capacity), expected, strict=True):
        assert torch.equal(got, want)


# One chunk of 2,048 keys, its edges, and several that must be merged.
@pytest.mark.parametrize("shape", [(), (0,), (1,), (64, 11), (2047,), (2048,), (2049,), (3, 1500), (6200,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_reference(ops, shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    item_ids = torch.randint(0, 900, shape, generator=generator, dtype=dtype)
    _check(ops, item_ids, item_ids.numel() + 1)


def test_any_order_of_threads(ops, emulate):
    item_ids = torch.randint(0, 50, (2100,))
    for seed in range(4):
        emulate(seed=seed)
        _check(ops, item_ids, 51)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2**39 - 1) | st.integers(0, 6), max_size=60), st.integers(0, 9))
def test_random_lists(ops, values, spare):
    item_ids = torch.tensor(values, dtype=torch.int64)
    _check(ops, item_ids, len(set(values) - {0}) + 1 + spare)


def test_only_padding(ops):
    _check(ops, torch.zeros(4, 11, dtype=torch.int64), 8)


def test_strided_input(ops):
    _check(ops, torch.randint(0, 9, (40, 6))[:, ::2], 200)


def test_errors_name_the_argument(ops):
    with pytest.raises(RuntimeError, match="capacity: more distinct ids"):
        ops.deduplicate(torch.arange(10), 9)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        ops.deduplicate(torch.arange(3), 0)
    with pytest.raises(TypeError, match="item_ids: expected int64 or int32, got Short"):
        ops.deduplicate(torch.arange(3, dtype=torch.int16), 4)
    for wrong in (-1, 2**39):
        with pytest.raises(RuntimeError, match=r"item_ids: expected ids in \[0, 2\^39\)"):
            ops.deduplicate(torch.tensor([1, wrong]), 4)
