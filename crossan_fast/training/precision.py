"""What a step computes in: chosen for its device, and kept by a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crossan_fast.training.train_config import ComputePrecision, Precision

_ON_CPU = (
    "of CPUs those alone that multiply it are faster in bf16, a step by a sixth at most, with the full "
    "softmax by a quarter to a third, see benchmarks/results/"
)


@dataclass(frozen=True)
class ChosenPrecision:
    """Attributes:
    name: what is computed in; weights and optimizer are fp32 with each.
    reason: why, in words.
    """

    name: ComputePrecision
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(
    wanted: Precision, device: torch.device, began: ComputePrecision | None = None
) -> ChosenPrecision:
    """What to compute in.

    Args:
        wanted: a config's; `auto` is bf16 on a CUDA device that multiplies it, else fp32.
        began: of the run that goes on, which `auto` keeps on any device.

    Raises:
        ValueError: `tf32` on a device without it.
    """
    if wanted == "auto" and began is not None:
        chosen = ChosenPrecision(began, "as the run began")
    elif wanted == "auto":
        chosen = _automatic(device)
    else:
        chosen = ChosenPrecision(wanted, "asked for")
    if chosen.name == "tf32" and (refusal := _no_matrix_units(device)):
        raise ValueError(f"precision: expected fp32 or bf16 here, got 'tf32': {refusal}")
    return chosen


def _automatic(device: torch.device) -> ChosenPrecision:
    if device.type == "cpu":
        return ChosenPrecision("fp32", _ON_CPU)
    if refusal := _no_matrix_units(device):
        return ChosenPrecision("fp32", refusal)
    name = torch.cuda.get_device_name(device)
    return ChosenPrecision("bf16", f"autocast; {name} has matrix units for it")


def _no_matrix_units(device: torch.device) -> str | None:
    """Why a device has no matrix units for bf16 and TF32, which came in one generation, or None."""
    if device.type != "cuda":
        return f"{device.type} has no matrix units for bf16"
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
    return f"{torch.cuda.get_device_name(device)} has no matrix units for bf16"


@contextmanager
def computing_in(precision: ComputePrecision) -> Iterator[None]:
    """With `tf32`, products of fp32 within the block are TF32's, by torch's own switch; else as they were.

    Torch's products and the Triton kernels' follow that switch alike.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision != "tf32" or before == "tf32":
        yield
        return
    # Not `fp32_precision`, which leaves its predecessor as it was: torch 2.11 asks both, and refuses to
    # multiply where they differ.
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before
