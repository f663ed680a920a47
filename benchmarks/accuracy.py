"""Checks before speed: results against the float64 reference, judged by the plain reference's own error."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.registry import CheckFailed

# An implementation may err this much more than plain torch does in the same type: another order of operations
# moves an error that much, a mistake moves it by orders.
SLACK = 3.0
# A tensor of no more numbers holds few: how well a type rounds it is chance.
FEW = 64


def error(value: Tensor, truth: Tensor) -> float:
    """The larger of two relative errors, of the norm and of the worst element against the largest."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.shape != truth.shape:
        return float("inf")
    if not torch.isfinite(value).all():
        return float("inf")
    difference, tiny = value - truth, torch.finfo(torch.float64).tiny
    whole = difference.norm() / truth.norm().clamp_min(tiny)
    worst = difference.abs().amax() / truth.abs().amax().clamp_min(tiny) if truth.numel() else whole
    return float(torch.maximum(whole, worst))


def together(names: Sequence[str], *runs: Sequence[Tensor]) -> tuple[list[str], list[list[Tensor]]]:
    """Each run's tensors, those of few numbers joined with their like of other modalities (m0, m1, …).

    A cross gate's gradients are seven sums of both signs over all items and widths. In bf16 plain torch errs
    by 2e-3 in one tower and by 2e-2 in the next, and so does any other order: of one, chance would decide.
    """
    likes: dict[str, list[int]] = {}
    for at, (name, tensor) in enumerate(zip(names, runs[0], strict=True)):
        likes.setdefault(re.sub(r"\bm\d+\b", "m*", name) if tensor.numel() <= FEW else name, []).append(at)
    joined = [
        [
            torch.cat([run[at].flatten() for at in like]) if len(like) > 1 else run[like[0]]
            for like in likes.values()
        ]
        for run in runs
    ]
    return list(likes), joined


def compare(
    implementation: str,
    names: Sequence[str],
    values: Sequence[Tensor],
    truths: Sequence[Tensor],
    own_errors: Sequence[float],
    dtype: torch.dtype,
    terms: int,
) -> None:
    """Raise `CheckFailed` for the first tensor that errs too much more than plain torch does in `dtype`.

    Where plain torch was lucky with one tensor, its typical error over all of them stands in. A gate's
    gradient is a sum of both signs over all items and widths; with `terms` summands shared out to a tensor's
    elements, an fp32 sum in any order may err by √n · eps (Higham and Mary, 2019), whatever torch's own did.
    """
    if len(values) != len(truths):
        raise CheckFailed(f"{implementation}: expected {len(truths)} results, got {len(values)}")
    typical = statistics.median(own_errors)
    for name, value, truth, own in zip(names, values, truths, own_errors, strict=True):
        found = error(value, truth)
        summed = math.sqrt(terms / max(truth.numel(), 1)) * torch.finfo(torch.float32).eps
        allowed = max(SLACK * max(own, typical, torch.finfo(dtype).eps), summed)
        if not found <= allowed:
            raise CheckFailed(
                f"{implementation}: {name} errs by {found:.2e} from float64, allowed {allowed:.2e} "
                f"(plain torch in this type errs by {own:.2e})"
            )


def compare_exact(
    implementation: str, names: Sequence[str], values: Sequence[Tensor], truths: Sequence[Tensor]
) -> None:
    """Raise `CheckFailed` for the first tensor with a value that is not the truth's."""
    for name, value, truth in zip(names, values, truths, strict=True):
        if value.shape != truth.shape:
            raise CheckFailed(
                f"{implementation}: {name} has shape {list(value.shape)}, not {list(truth.shape)}"
            )
        different = value.to(truth.dtype) != truth
        if different.any():
            raise CheckFailed(
                f"{implementation}: {name} differs in {int(different.sum())} of {truth.numel()} elements"
            )
