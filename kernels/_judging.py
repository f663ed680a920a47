"""What a step does between its gradients' norms and AdamW, in one launch in place of eight of torch's.

The norm of all gradients together, what they are divided by where they are clipped, whether it is finite, and
the counts that training reads behind an epoch. No op of its own: it writes a step's counts in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._blocks import on_device
from crossan_fast.kernels._common import launch

# Norms are passed one by one, and a launch has 4 kB of arguments.
MOST = 400


@dataclass(frozen=True)
class Verdict:
    """What a step's update goes by, each fp32 `[]`.

    Attributes:
        norm: of all gradients together.
        divisor: what clips them, at least 1; None where they are not clipped.
        bad: 1 where the step is to be left out, else 0; None where none is.
    """

    norm: Tensor
    divisor: Tensor | None
    bad: Tensor | None


@triton.jit
def judge_kernel(norms, loss, kept, stopped, counted, norm, divisor, bad, least, slope):
    """See `judge`; one thread's work, whose loads do not wait for one another."""
    sum_ = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(norms)):
        own = tl.load(norms[i])
        sum_ += own * own
    whole = tl.sqrt_rn(sum_)
    tl.store(norm, whole)
    if divisor is not None:
        scale = least + slope * whole
        tl.store(divisor, tl.where(scale < 1.0, 1.0, scale))  # NaN stays NaN
    lost = (whole < float("inf")) == 0  # NaN is not less, either
    before = tl.load(counted)
    if bad is not None:
        if loss is not None:
            lost = lost | ((tl.abs(tl.load(loss).to(tl.float32)) < float("inf")) == 0)
        tl.store(bad, lost.to(tl.float32))
        tl.store(counted, before + lost.to(tl.int64))
        keep = lost
    else:
        keep = tl.load(stopped) == 0
        lost = lost | (before != 0)
        tl.store(stopped, lost.to(tl.uint8))
        tl.store(counted, before + lost.to(tl.int64))
    for i in tl.static_range(len(norms)):
        tl.store(kept + i, tl.load(norms[i]), mask=keep)


def judge(
    norms: Sequence[Tensor],
    loss: Tensor | None,
    kept: Tensor,
    stopped: Tensor,
    counted: Tensor,
    clip_norm: float | None,
    epsilon: float,
    skip: bool,
) -> Verdict:
    """Judge a step, and count it where it is not finite.

    Args:
        norms: of each gradient, fp32 `[]`, `MOST` at most.
        loss: `[]`, judged as well where steps are left out; None: not.
        kept: fp32 `[len(norms)]`, takes the norms of a step that is left out; or else of each step up to the
            first that is not finite.
        stopped: bool `[]`, whether there was one; not touched where steps are left out.
        counted: int64 `[]`, is added 1 for a step that is left out; or else for each from the first bad one.
        clip_norm, epsilon: gradients are divided by (norm + epsilon) / clip_norm, by no less than 1.
        skip: steps that are not finite are left out.
    """
    divisor = None if clip_norm is None else kept.new_empty(())
    verdict = Verdict(kept.new_empty(()), divisor, kept.new_empty(()) if skip else None)
    bound = 1.0 if clip_norm is None else clip_norm
    with on_device(kept):
        launch(
            judge_kernel,
            (1,),
            tuple(norms),
            loss if skip else None,
            kept,
            stopped.view(torch.uint8),
            counted,
            verdict.norm,
            verdict.divisor,
            verdict.bad,
            epsilon / bound,
            1 / bound,
            num_warps=1,
        )
    return verdict
