"""Triton's own CUDA driver and launcher on a `libcuda.so.1` without a device, every launch checked.

with pretended_driver(launches.append), PretendedGpu():
    ...                                   # kernels compile for sm_90, and are launched into the list
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.pretended_gpu.building import built
from benchmarks.pretended_gpu.tensors import DEVICE_BIT, GPU, OnGpu

_MEMORY = 80 << 30
_MOST_SHARED = 227 * 1024
# Bytes of an argument by its type in a kernel's signature; pointers have 8.
_SIZES = {"i1": 4, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
_FLOATS = {"fp32": "<f", "fp64": "<d"}
_SIZES |= {"fp32": 4, "fp64": 8}
_POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Launch:
    """One launch as the device would have seen it."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared: int


class _Record(ctypes.Structure):
    """`Launch` of libcuda.c."""

    _fields_ = [
        ("number", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("arguments", ctypes.c_uint32),
        ("sizes", ctypes.c_uint32 * 512),
        ("values", ctypes.c_uint64 * 512),
    ]


@contextmanager
def pretended_driver(launched: Callable[[Launch], object], *, compiling: bool = True) -> Iterator[None]:
    """Within the block Triton compiles and launches for an sm_90; `launched` is told of each launch.

    Args:
        compiling: off, launches are told of, and neither compiled nor checked.

    Raises, at a launch: what the driver refuses, as Triton raises it; AssertionError, naming the kernel and
    the argument, where the device would not be handed what the call says.
    """
    library = built("libcuda.c", "libcuda.so.1")
    record = _Record.in_dll(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), "last_launch")
    run = JITFunction.run

    @functools.wraps(run)
    def checked(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        if not compiling:
            launched(Launch(self.__name__, (*grid, 1, 1)[:3], kwargs.get("num_warps", 4), 0))
            return None
        before = record.number
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            _check(self, compiled, record, before, grid, args, kwargs)
            warps = record.block[0] // 32
            launched(Launch(self.__name__, tuple(record.grid), warps, record.shared))
        return compiled

    with ExitStack() as stack:
        stack.enter_context(torch_cuda())
        stack.enter_context(mock.patch.object(knobs.nvidia, "libcuda_path", str(library.parent)))
        stack.enter_context(mock.patch.object(JITFunction, "run", checked))
        from triton.backends.nvidia.driver import CudaDriver

        triton.runtime.driver.set_active(CudaDriver())
        yield


@contextmanager
def torch_cuda() -> Iterator[None]:
    """Within the block `torch.cuda` answers what a step asks of it, as for one H100."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda: True,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    # Where that says yes, autocast is off, with a warning.
    amp = mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with mock.patch.multiple(torch.cuda, **answers), amp:
        yield


def _check(
    function: Any,
    compiled: Any,
    record: _Record,
    before: int,
    grid: Sequence[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """What was launched is what was called: the grid, and every argument in its place, its size and value."""
    name = function.__name__
    assert record.number == before + 1, f"{name}: nothing was launched on grid {tuple(grid)}"
    asked = (*grid, 1, 1)[:3]
    assert tuple(record.grid) == asked, f"{name}: expected grid {asked}, got {tuple(record.grid)}"
    assert record.shared <= _MOST_SHARED, f"{name}: {record.shared} bytes of shared memory"
    bound = function.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in function.arg_names})
    bound.apply_defaults()
    values = [bound.arguments[parameter] for parameter in function.arg_names]
    types = [compiled.src.signature[parameter] for parameter in function.arg_names]
    passed = list(_passed(function.arg_names, values, types))
    # Behind ours come two of Triton's own, which no kernel here has a use for.
    assert record.arguments == len(passed) + 2, f"{name}: takes {record.arguments}, was passed {len(passed)}"
    for index, (where, value, kind) in enumerate(passed):
        _check_argument(f"{name}: {where}", value, kind, record.sizes[index], record.values[index])
    for index in (len(passed), len(passed) + 1):
        assert record.values[index] == 0, f"{name}: scratch memory at {record.values[index]:#x}"
    for path, attributes in compiled.src.attrs.items():
        value = functools.reduce(lambda inner, step: inner[step], path, values)
        _check_divisor(f"{name}: {function.arg_names[path[0]]}{list(path[1:])}", value, attributes)


def _passed(
    names: Sequence[str], values: Sequence[Any], types: Sequence[Any]
) -> Iterator[tuple[str, Any, str]]:
    """Arguments in the machine code's order: tuples opened, compile-time constants left out."""
    for name, value, kind in zip(names, values, types, strict=True):
        if isinstance(kind, tuple):
            yield from _passed([f"{name}[{i}]" for i in range(len(kind))], value, kind)
        elif kind != "constexpr":
            yield name, value, kind


def _check_argument(where: str, value: Any, kind: str, size: int, got: int) -> None:
    """One argument as the kernel gets it against the caller's."""
    expected = 8 if kind.startswith("*") else _SIZES[kind]
    assert size == expected, f"{where}: expected {expected} bytes for {kind}, the kernel reads {size}"
    if not kind.startswith("*"):
        _check_number(where, value, kind, size, got)
        return
    assert isinstance(value, OnGpu), f"{where}: expected a tensor on {GPU}, got {_describe(value)}"
    assert kind == _POINTERS[value.dtype], f"{where}: expected {kind}, got {_describe(value)}"
    assert got == value.data_ptr(), f"{where}: expected {value.data_ptr():#x}, got {got:#x}"
    if value.numel():
        held, storage = value.held, value.held.untyped_storage()
        last = sum((n - 1) * step for n, step in zip(held.shape, held.stride(), strict=True)) + 1
        stop = (got ^ DEVICE_BIT) + last * held.element_size()
        assert stop <= storage.data_ptr() + storage.nbytes(), f"{where}: {_describe(value)} passes its memory"


def _check_number(where: str, value: Any, kind: str, size: int, got: int) -> None:
    if kind in _FLOATS:
        expected = int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    else:
        least = 0 if kind.startswith("u") else -(1 << (8 * size - 1))
        assert least <= value < least + (1 << 8 * size), f"{where}: {value} does not fit {kind}"
        expected = value & ((1 << 8 * size) - 1)
    assert got == expected, f"{where}: expected {value}, as {kind} {expected:#x}, got {got:#x}"


def _check_divisor(where: str, value: Any, attributes: Sequence[Sequence[Any]]) -> None:
    for attribute, divisor in attributes:
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if attribute == "tt.divisibility":
            assert number % divisor == 0, f"{where}: compiled for multiples of {divisor}, got {number}"


def _describe(value: Any) -> str:
    return (
        f"{list(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
    )
