"""gather_convert: rows of stored states by id, as floats, in one pass.

What brings a cache's rows to a GPU whose kernels cannot read them by id, out of page-locked host memory too.
The cache lies below the ops and asks for the kernel through `crossan_fast.cache.staging.use_gather_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from crossan_fast._checks import FLOATS, check_range, check_tensor, describe
from crossan_fast.cache import staging
from crossan_fast.cache.quantize import dequantize
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define
from crossan_fast.ops.side_network import STATE_DTYPES


def gather_convert_reference(
    states: Tensor, scales: Tensor | None, ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition, in plain torch.

    Args:
        states: `[R, L, D]`, any floating type, or int8 / float8_e4m3fn codes with `scales`.
        scales: fp32 `[R, L]`; a state is its code times its scale, rounded once. None: the states are values.
        ids: int64 or int32 `[N]`, the rows wanted; None: all R.
        dtype: of the result.

    Returns:
        `[N, L, D]`.
    """
    if ids is not None:
        # The CPU gathers no one-byte floats, but bytes.
        stored = states.view(torch.uint8) if states.element_size() == 1 else states
        states = stored[ids].view(states.dtype)
        scales = None if scales is None else scales[ids]
    return states.to(dtype) if scales is None else dequantize(states, scales, dtype)


def gather_convert(
    states: Tensor,
    scales: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Rows of a table as floats on the device of `ids`; arguments as `gather_convert_reference`. No gradient.

    With `backend="cuda"` the table may also lie in page-locked host memory.

    Raises:
        TypeError, ValueError: arguments that do not fit, named; on the CPU also ids out of range.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    check_tensor("states", states, (None, None, None), dtypes=STATE_DTYPES)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS}, got {describe(dtype)}")
    if scales is not None:
        check_tensor("scales", scales, states.shape[:2], dtypes=(torch.float32,), device=states.device)
    if ids is not None:
        check_tensor("ids", ids, (None,), dtypes=(torch.int64, torch.int32))
        check_range("ids", ids, 0, states.shape[0] - 1)
    where = states.device if ids is None else ids.device
    choice = _choose(where, backend)
    scales = None if scales is None else scales.detach()
    if choice != "eager":
        return _gather_convert(states.detach(), scales, ids, dtype, choice)
    if states.device != where:
        raise ValueError(f"states: expected device {where} as ids, got {describe(states)}")
    return gather_convert_reference(states.detach(), scales, ids, dtype)


def _choose(device: torch.device, backend: str = "auto") -> str:
    # Bytes: what types a kernel reads and writes it says itself.
    return choose("gather_convert", device.type, torch.uint8, (), backend).backend


def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """For the cache: the kernel for rows that go to `device`, or None where its own copies serve."""
    if device.type != "cuda" or (backend := _choose(device)) == "eager":
        return None
    return functools.partial(_call, backend)


def _call(
    backend: str, states: Tensor, scales: Tensor | None, ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _gather_convert(states, scales, ids, dtype, backend)


def _fake(states, scales, ids, dtype):
    count, device = (len(states), states.device) if ids is None else (len(ids), ids.device)
    return states.new_empty((count, *states.shape[1:]), dtype=dtype, device=device)


_gather_convert = define(
    "gather_convert(Tensor states, Tensor? scales, Tensor? ids, ScalarType dtype) -> Tensor",
    _fake,
    one_device=False,
)
staging.use_gather_kernel(_kernel)
