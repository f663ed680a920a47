import pytest
import torch

from crossan_fast.cache.quantize import dequantize, quantize

STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
OUTPUTS = [torch.float32, torch.float16, torch.bfloat16]


def _store(states, dtype):
    if dtype in (torch.float8_e4m3fn, torch.int8):
        return quantize(states, dtype)
    return states.to(dtype), None


# 8-element vectors, and widths that rule them out.
@pytest.mark.parametrize("width", [8, 72, 5])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("output", OUTPUTS)
def test_equals_torch_exactly(ops, width, stored, output):
    states, scales = _store(torch.randn(23, 3, width) * 3, stored)
    ids = torch.randint(0, 23, (41,))
    got = ops.gather_convert(states, scales, ids, output)
    want = states.float() if scales is None else dequantize(states, scales)
    assert torch.equal(got, want[ids].to(output))


def test_every_code_converts(ops):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 1, 256)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        got = ops.gather_convert(codes.view(dtype), None, None, torch.float32)
        assert torch.equal(got.nan_to_num(1e9), codes.view(dtype).float().nan_to_num(1e9))


def test_rounding_and_range_of_sixteen_bits(ops):
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 40, 200), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, 65519.99, 65520.0, 6e-8, 2.9e-8, 3e-8, 6.1e-5, -6.09e-5, 1e-45])
    values = torch.cat([bits.view(torch.float32), edges.expand(1, 40, 10)], dim=2)
    for dtype in (torch.float16, torch.bfloat16):
        got, want = ops.gather_convert(values, None, None, dtype), values.to(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0).view(torch.int16), want.nan_to_num(0).view(torch.int16))
        back = ops.gather_convert(want, None, None, torch.float32)
        assert torch.equal(back.nan_to_num(0), want.float().nan_to_num(0))


def test_no_ids_and_int32_ids(ops):
    states = torch.randn(6, 2, 16)
    assert torch.equal(ops.gather_convert(states, None, None, torch.float32), states)
    ids = torch.tensor([5, 0, 5], dtype=torch.int32)
    assert torch.equal(ops.gather_convert(states, None, ids, torch.float32), states[ids])


def test_misaligned_base(ops):
    states = torch.randn(6 * 2 * 16 + 1)[1:].view(6, 2, 16)
    assert torch.equal(ops.gather_convert(states, None, None, torch.float32), states)


@pytest.mark.parametrize("shape, ids", [((0, 2, 8), 0), ((4, 0, 8), 3), ((4, 2, 0), 3), ((4, 2, 8), 0)])
def test_empty(ops, shape, ids):
    got = ops.gather_convert(torch.randn(shape), None, torch.zeros(ids, dtype=torch.int64), torch.bfloat16)
    assert got.shape == (ids, *shape[1:])


def test_errors_name_the_argument(ops):
    states, ids = torch.randn(4, 2, 8), torch.arange(3)
    for wrong in (-1, 4):
        with pytest.raises(RuntimeError, match="ids: an id is outside"):
            ops.gather_convert(states, None, torch.tensor([0, wrong]), torch.float32)
    cases = [
        ((states[0], None, ids, torch.float32), ValueError, "states: expected shape"),
        ((states.double(), None, ids, torch.float32), TypeError, "states: expected float32"),
        ((states[:, :, ::2], None, ids, torch.float32), ValueError, "states: expected a contiguous"),
        ((states, torch.ones(4, 3), ids, torch.float32), ValueError, "scales: expected shape"),
        ((states, torch.ones(4, 2).double(), ids, torch.float32), TypeError, "scales: expected Float"),
        ((states, None, ids.to(torch.uint8), torch.float32), TypeError, "ids: expected int64"),
        ((states, None, ids[None], torch.float32), ValueError, "ids: expected shape"),
        ((states, None, ids, torch.int8), TypeError, "dtype: expected"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            ops.gather_convert(*arguments)
