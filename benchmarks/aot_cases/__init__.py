"""What is compiled ahead of time: for each op with a Triton kernel a module of its name, with `cases()`.

They call host functions on meta tensors, which choose kernels, tiles and specialisations as on a device.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crossan_fast.ops._dispatch import OPS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What an op is compiled in once: fp16, and fp32 whose products are TF32's.
OTHER_DTYPES = {"fp16": torch.float16, "tf32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Host functions called on meta tensors.

    Attributes:
        name: op and sizes.
        dtype: what it computes in; `tf32` is fp32 under torch's switch.
        run: calls the host functions.
        hot: kernels that must not spill.
        matrix: kernels whose products must be matrix instructions.
        wide: those of them whose tiles have the 64 rows of sm_90's own instruction, and so must use it.
        short: whether every change compiles it (.ci/triton).
    """

    name: str
    dtype: str
    run: Callable[[], object]
    hot: frozenset[str] = frozenset()
    matrix: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    short: bool = False


def new(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of nothing but a shape and a type."""
    return torch.empty(shape, device="meta", dtype=kind)


def products(kernels: frozenset[str], dtype: str) -> frozenset[str]:
    """The kernels that must use matrix units: a product of fp32 does so only by torch's own switch."""
    return kernels if dtype != "fp32" else frozenset()


def of_all_ops() -> tuple[Case, ...]:
    """Every case; ModuleNotFoundError names an op whose kernels have none."""
    found: list[Case] = []
    for op in OPS:
        if importlib.util.find_spec(f"crossan_fast.kernels.{op}") is not None:
            found += importlib.import_module(f"{__name__}.{op}").cases()
    return tuple(found)
