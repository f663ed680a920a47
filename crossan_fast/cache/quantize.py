"""fp8 and int8 storage of states: one fp32 scale for each row and level, value = stored · scale.

A scale per (item, level) follows the norms of hidden states, which grow by an order of magnitude with depth
and differ between items; within one vector of D values int8's 127 steps or e4m3's 3-bit mantissa then
suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast.cache.format import is_quantized


def quantize(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Store `[..., D]` floats as `dtype` (int8 or float8_e4m3fn), with fp32 scales `[...]`.

    The largest magnitude of a vector maps to the largest code (127, or 448), so nothing overflows; int8
    rounds to nearest even, e4m3 by torch's own cast. A vector of zeros gets scale 1. Values must be finite
    (not checked).
    """
    if not is_quantized(dtype):
        raise TypeError(f"dtype: expected int8 or float8_e4m3fn, got {dtype}")
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    states = states.float()
    peak = states.abs().amax(dim=-1)
    # Below fp32's normal range the quotient would lose its digits, or be a division by zero.
    scales = torch.where(
        peak > 0, (peak / top).clamp_min(torch.finfo(torch.float32).tiny), torch.ones_like(peak)
    )
    codes = (states / scales.unsqueeze(-1)).clamp(-top, top)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


def dequantize(stored: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Floats of codes `[..., D]` and scales `[...]`: multiplied in fp32, then rounded to `dtype`."""
    return (stored.float() * scales.unsqueeze(-1)).to(dtype)
