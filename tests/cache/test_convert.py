"""int8 and fp8: error bounds of the formats themselves, exact cases, whole caches converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossan_fast.cache import HiddenStateCache, convert_cache, write_cache
from crossan_fast.cache.quantize import dequantize, quantize

QUANTIZED = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", QUANTIZED)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 70),
    magnitude=st.sampled_from([1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e37]),
)
def test_error_is_within_half_a_step(dtype: torch.dtype, seed: int, width: int, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(5, 3, width, generator=generator) * magnitude
    stored, scales = quantize(states, dtype)
    assert stored.dtype == dtype and scales.dtype == torch.float32 and scales.shape == (5, 3)
    back = dequantize(stored, scales, torch.float64).double()
    exact, scale = states.double(), scales.double().unsqueeze(-1)
    if dtype == torch.int8:
        allowed = 0.5 * scale  # one step is one scale
    else:
        # 3 mantissa bits: half a step is 2^-4 of the value, and 2^-10 of the scale where e4m3 is subnormal.
        allowed = torch.maximum(exact.abs() / 16, scale / 1024)
    # fp32 rounding of the quotient and of the product, and magnitudes where fp32 itself is subnormal.
    slack = exact.abs() * 2**-22 + 2**-149
    assert ((back - exact).abs() <= allowed + slack).all()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_codes_times_a_power_of_two_come_back_exactly(dtype: torch.dtype) -> None:
    top = 127 if dtype == torch.int8 else 448
    codes = torch.arange(-top, top + 1, dtype=torch.float32).to(dtype).float()
    states = torch.stack([codes * 2.0**power for power in (-20, 0, 9)]).unsqueeze(0)
    stored, scales = quantize(states, dtype)
    assert scales.tolist() == [[2.0**-20, 1.0, 2.0**9]]
    assert torch.equal(dequantize(stored, scales), states)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    stored, scales = quantize(torch.zeros(2, 3, 4), dtype)
    assert (scales == 1).all() and not dequantize(stored, scales).any()


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_a_converted_cache_gathers_what_quantize_says(tmp_path: Path, dtype: str) -> None:
    states = {"text": torch.randn(41, 3, 8), "image": torch.randn(41, 3, 5) * 30}
    present = torch.rand(41, 2) < 0.8
    for tensor in states.values():
        tensor[0] = 0
    present[0] = False
    names = [f"n{k}" for k in range(40)]
    write_cache(tmp_path / "c", states, present=present, item_names=names, sources={"text": {"encoder": "x"}})
    seen: list[int] = []
    errors = convert_cache(tmp_path / "c", tmp_path / "q", dtype, progress=seen.append)
    assert sum(seen) == 82
    cache = HiddenStateCache.open(tmp_path / "q", verify=True)
    assert torch.equal(cache.present, present) and list(cache.item_names[1:]) == names
    assert cache.sources["text"] == {"encoder": "x", "converted_from": "fp32"}
    ids = torch.randint(0, 41, (30,))
    rows, half = cache.gather(ids), cache.gather(ids, dtype=torch.bfloat16)
    for tier in ("mmap", "resident"):
        cache.to("cpu", tier)
        scales = cache.scales("cpu")
        assert scales is not None
        for column, name in enumerate(states):
            kept = torch.where(present[:, column, None, None], states[name], 0)
            stored, expected = quantize(kept, cache.dtype)
            assert torch.equal(cache.states("cpu")[column].view(torch.uint8), stored.view(torch.uint8))
            assert torch.equal(scales[column], expected)
            assert torch.equal(rows[name], dequantize(stored, expected)[ids])
            assert torch.equal(half[name], dequantize(stored, expected)[ids].bfloat16())
            truth = (dequantize(stored, expected) - kept).double().norm() / kept.double().norm()
            assert errors[name] == pytest.approx(float(truth), rel=1e-6) and errors[name] > 1e-4
    back = convert_cache(tmp_path / "q", tmp_path / "b", "fp32")
    assert back == {"text": 0.0, "image": 0.0}
    assert torch.equal(HiddenStateCache.open(tmp_path / "b").gather(ids)["image"], rows["image"])


def test_quantized_tensors_in_memory() -> None:
    states = torch.randn(6, 2, 4)
    states[0] = 0
    stored, scales = quantize(states, torch.int8)
    cache = HiddenStateCache.from_tensors({"a": stored}, scales={"a": scales})
    assert torch.equal(cache.gather(torch.tensor([3]))["a"], dequantize(stored, scales)[[3]])
    with pytest.raises(ValueError, match="scales: int8 and fp8 states need them"):
        HiddenStateCache.from_tensors({"a": stored})
    with pytest.raises(ValueError, match="scales: int8 and fp8 states need them and no others"):
        HiddenStateCache.from_tensors({"a": states}, scales={"a": scales})
    with pytest.raises(ValueError, match=r"scales: unknown modality 'b', expected \['a'\]"):
        HiddenStateCache.from_tensors({"a": stored}, scales={"b": scales})
    with pytest.raises(ValueError, match=r"scales\['a'\]: expected shape \[6, 2\], got float32 \[6, 1\]"):
        HiddenStateCache.from_tensors({"a": stored}, scales={"a": scales[:, :1]})


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    states = torch.randn(4, 2, 3)
    states[0], states[2, 1, 0] = 0, 1e30
    write_cache(tmp_path / "c", {"a": states}, item_names=["x", "y", "z"])
    with pytest.raises(
        ValueError, match=r"NaN or inf \(once stored as fp16\) in 1 row, first in row 2 \(item 'y'\)"
    ):
        convert_cache(tmp_path / "c", tmp_path / "d", "fp16")
    with pytest.raises(ValueError, match="out: expected another folder"):
        convert_cache(tmp_path / "c", tmp_path / "c" / ".." / "c", "int8", overwrite=True)
    convert_cache(tmp_path / "c", tmp_path / "d", "int8")
    with pytest.raises(FileExistsError, match="is not empty; pass overwrite=True"):
        convert_cache(tmp_path / "c", tmp_path / "d", "fp8")
    convert_cache(tmp_path / "c", tmp_path / "d", "fp8", overwrite=True)
    assert HiddenStateCache.open(tmp_path / "d").dtype == torch.float8_e4m3fn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]
