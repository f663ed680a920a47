"""What every Triton kernel here shares: products, activations, launches, and what the device is.

`launch` is the only place where kernels start, so that one switch (`record_launches`) can instead compile
what would have run, for a device that is not there: benchmarks/aot.py and its test read the machine code's
figures from it, with the very arguments, tile sizes and specialisations the host functions choose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.ops._kept import power_of_two as power_of_two

# Device classes whose products wait for their operands in registers: tiles that fit Hopper spill there. RTX
# 50s come after it, with the instructions and the shared memory of those before.
BEFORE_HOPPER = frozenset({"sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121"})

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if _INTERPRETED:
        # The interpreter keeps bf16 as bit patterns and its dot multiplies those; float64 holds them exactly.
        # And its products are a BLAS's, whose order of sums changes with the CPU and with the sides of the
        # operands: a logit would differ between forward and backward. In float64 no order shows.
        a = a.to(tl.float32).to(tl.float64)
        b = b.to(tl.float32).to(tl.float64)
        return tl.dot(a, b, acc.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.constexpr_function
def product_depth(size):
    """How much of a product's inner size is multiplied at a time: G of r = 256 fits no shared memory."""
    return min(size, 64)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates to bf16, which doubles the error that tests judge. Not for NaN with a full
        # mantissa, which would carry into the sign; arithmetic makes none.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= 0xFFFF0000  # what is left of a rounded zero is a subnormal number, which it takes for another
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def activate(x, GELU: tl.constexpr):
    """gelu (erf) or relu of fp32 x; NaN stays NaN, as in torch."""
    if GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def activate_grad(x, GELU: tl.constexpr):
    """The derivative of `activate` at fp32 x."""
    if GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def pick(pointers, index, FIRST: tl.constexpr = 0, STEP: tl.constexpr = 1):
    """pointers[FIRST + index·STEP] of a tuple, for an index known at run time; they share a dtype."""
    chosen = pointers[FIRST]
    for i in tl.static_range(1, len(pointers) // STEP):
        if index == i:
            chosen = pointers[FIRST + i * STEP]
    return chosen


@triton.jit
def pick_constant(values: tl.constexpr, index, FIRST: tl.constexpr = 0, STEP: tl.constexpr = 1):
    """values[FIRST + index·STEP] of a tuple of compile-time integers, as an int32 scalar.

    Not `values[FIRST::STEP]` by the caller: Triton 3.6 slices no compile-time tuple.
    """
    chosen = tl.full((), values[FIRST], tl.int32)
    for i in tl.static_range(1, len(values) // STEP):
        chosen = tl.where(index == i, values[FIRST + i * STEP], chosen)
    return chosen


@triton.jit
def softmax(logits, keep):
    """Over the kept entries of a row; zeros in a row that keeps none."""
    highest = tl.max(tl.where(keep, logits, float("-inf")), axis=1)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    power = tl.where(keep, tl.exp(logits - highest[:, None]), 0.0)
    total = tl.sum(power, axis=1)
    return power / tl.where(total > 0, total, 1.0)[:, None]


# ---------------------------------------------------------------------------------------------- launches


@dataclass
class Launch:
    """One kernel compiled by `record_launches`: its name and Triton's CompiledKernel."""

    name: str
    compiled: Any


@dataclass
class _Recorder:
    capability: int
    only: frozenset[str] | None
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid`; inside `record_launches`, compile it instead."""
    if _recorder is not None:
        if _recorder.only is not None and kernel.__name__ not in _recorder.only:
            return
        compiled = kernel.warmup(*args, grid=grid, **options)
        _recorder.launches.append(Launch(kernel.__name__, compiled))
    else:
        kernel[grid](*args, **options)


class _TargetOnly:
    """As much of a Triton driver as compiling needs; there is no device behind it."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -self.target.arch  # a key of Triton's per-device caches that no real device has

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def record_launches(capability: int, only: frozenset[str] | None = None) -> Iterator[list[Launch]]:
    """Compile for sm_`capability` what the host functions would launch; call them on meta tensors.

    Args:
        capability: 80, 90, …
        only: names of the kernels to compile; None: all.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    global _recorder
    if INTERPRETED:
        raise RuntimeError("record_launches: kernels were loaded with TRITON_INTERPRET=1; nothing compiles")
    from triton.runtime import driver

    before, _recorder = _recorder, _Recorder(capability, only)
    driver.set_active(_TargetOnly(capability))
    try:
        yield _recorder.launches
    finally:
        _recorder = before
        if torch.cuda.is_available():  # else there is no driver to go back to, and asking for one raises
            driver.reset_active()


def device_class(device: torch.device) -> str:
    """`sm_90`, `sm_80`, …, or `interpreter`: the first key of every table of launch configs."""
    if _recorder is not None:
        return f"sm_{_recorder.capability}"
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def device_name(device: torch.device) -> str:
    """What autotuned configs belong to: cards of one class differ in multiprocessors and bandwidth."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device_class(device)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at one a multiprocessor; H100's number where only compiling."""
    if _recorder is not None:
        return 132 if _recorder.capability >= 90 else 108
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """How the products of a dtype multiply fp32: `tf32` only where torch's own switch says so, else `ieee`.

    The switch is `torch.backends.cuda.matmul.fp32_precision`; `torch.set_float32_matmul_precision` turns it
    to `tf32` for "high" and "medium" alike: on CUDA torch documents no other meaning of either.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def refuses_device(device_type: str) -> str | None:
    """Why no Triton kernel can run on tensors of this device type, or None."""
    if _recorder is not None:
        return None  # nothing runs
    if INTERPRETED:
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs Triton kernels on CPU tensors only"
    return None if device_type == "cuda" else f"Triton needs CUDA tensors, got {device_type}"


def as_storage(tensor: Tensor) -> Tensor:
    """fp8 codes as the bytes that kernels decode themselves (sm_80 has no fp8 type); others unchanged."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def uniform(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The tensors contiguous and of one dtype (`dtype`, or theirs, or fp32 where they differ)."""
    if dtype is None:
        kinds = {t.dtype for t in tensors}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    if all(t.dtype == dtype for t in tensors):
        return [t.detach().contiguous() for t in tensors]
    made = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in tensors]
    torch._foreach_copy_(made, [t.detach() for t in tensors])  # on a GPU one launch for all
    return made
