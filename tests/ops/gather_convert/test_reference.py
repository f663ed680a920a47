"""gather_convert in plain torch against sums by hand, its errors, and how the cache finds it."""

from __future__ import annotations

import pytest
import torch

from crossan_fast import ops
from crossan_fast.cache import staging
from crossan_fast.cache.quantize import quantize


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_codes_times_scales_of_the_rows_asked_for(stored):
    codes, scales = quantize(torch.randn(7, 2, 5), stored)
    ids = torch.tensor([6, 0, 6])
    got = ops.gather_convert(codes, scales, ids)
    for place, row in enumerate(ids.tolist()):
        for level in range(2):
            assert torch.equal(got[place, level], codes[row, level].float() * scales[row, level])
    assert torch.equal(ops.gather_convert(codes, scales), ops.gather_convert(codes, scales, torch.arange(7)))


def test_values_are_rounded_once_and_rows_may_repeat():
    states, ids = torch.randn(4, 3, 6), torch.tensor([1, 1, 3], dtype=torch.int32)
    assert torch.equal(
        ops.gather_convert(states, ids=ids, dtype=torch.bfloat16), states[[1, 1, 3]].bfloat16()
    )
    assert ops.gather_convert(states, ids=ids[:0]).shape == (0, 3, 6)


def test_errors_name_the_argument():
    states = torch.randn(4, 2, 8)
    for arguments, message in (
        ((states[0],), r"states: expected shape \[\?, \?, \?\]"),
        ((states, torch.ones(4, 3)), r"scales: expected shape \[4, 2\]"),
        ((states, None, torch.tensor([[0]])), r"ids: expected shape \[\?\]"),
        (
            (states, None, torch.zeros(1, dtype=torch.int64, device="meta")),
            "states: expected device meta as ids",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.gather_convert(*arguments)
    with pytest.raises(TypeError, match="ids: expected dtype int64, int32"):
        ops.gather_convert(states, None, torch.zeros(1))


def test_the_cache_asks_the_dispatcher(monkeypatch):
    gpu = torch.device("cuda")
    assert staging.gather_kernel(torch.device("cpu")) is None
    monkeypatch.delenv("CROSSAN_FAST_BACKEND", raising=False)
    assert staging.gather_kernel(gpu) is None  # not measured, so not by itself
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(
            ops.BackendUnavailable, match="gather_convert: backend 'cuda' was asked for on cuda"
        ):
            staging.gather_kernel(gpu)
