"""The kernel that clips and judges a step's gradients against the ops of torch in whose place it stands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.training import OptimizerConfig, TrainStep, make_optimizer

MODALITIES = (Modality("text", 8, 2), Modality("image", 12, 2))
# Of each step: what its gradients are multiplied by, the loss, and the parameter whose gradient gets a value.
STEPS: tuple[tuple[float, float, tuple[int, float] | None], ...] = (
    (1e-6, 1.0, None),
    (3.0, 1.0, None),
    (3.0, 1.0, (2, math.nan)),
    (0.1, 1.0, None),
    (1.0, 1.0, (0, -math.inf)),
    (1.0, math.inf, None),
    (1.0, math.nan, (5, math.nan)),
    (0.5, 2.0, None),
)


class Elsewhere:
    """As a step on a GPU, which is not waited for."""

    type = "cuda"


def make_step(device: torch.device, by_kernel: bool, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = CrossanModel(CrossanConfig(MODALITIES, bottleneck=4, embedding_dim=8), backend="eager").to(device)
    states = {m.name: torch.zeros(5, m.levels, m.width) for m in MODALITIES}
    settings = OptimizerConfig(learning_rate=1e-2, **options)
    step = TrainStep(model, HiddenStateCache.from_tensors(states), make_optimizer(model, settings), settings)
    for group in step.optimizer.param_groups:
        group["eps"] = 1.0  # so large that a step depends on its gradients' size
    step.device = Elsewhere()  # type: ignore[assignment]
    step._by_kernel = by_kernel
    if options["clip_norm"] is not None:
        from crossan_fast.training.optimizer import ClippedByStep

        step._clipped = ClippedByStep(options["clip_norm"], device)
    return step


def run(step: TrainStep, without: int | None) -> list[Any]:
    """All that is left of each step; `without`: the parameter that has no gradient."""
    generator, kept = torch.Generator().manual_seed(1), []
    for factor, loss, bad in STEPS:
        for index, parameter in enumerate(step._parameters):
            drawn = factor * torch.randn(parameter.shape, generator=generator)
            if bad is not None and bad[0] == index:
                drawn.view(-1)[-1] = bad[1]
            parameter.grad = None if index == without else drawn.to(parameter.device)
        step.update(torch.tensor(loss, device=step._norms.device))
        kept.append([step.gradient_norm, step.unsound, step.skipped, step._norms, *step._parameters])
        kept[-1] = [nn.Parameter.detach(tensor).clone() for tensor in kept[-1]]
    return kept


@pytest.mark.parametrize("without", [None, 3])
@pytest.mark.parametrize("clip_norm", [0.5, None])
@pytest.mark.parametrize("skip_nonfinite", [0, 3])
def test_gives_what_torch_gives(
    device: torch.device, skip_nonfinite: int, clip_norm: float | None, without: int | None
) -> None:
    options = {"skip_nonfinite": skip_nonfinite, "clip_norm": clip_norm}
    found = run(make_step(device, True, **options), without)
    expected = run(make_step(device, False, **options), without)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7, equal_nan=True)
    counts = [int(left[2] if skip_nonfinite else left[1]) for left in found]
    assert counts == ([0, 0, 1, 1, 2, 3, 4, 4] if skip_nonfinite else [0, 0, 1, 2, 3, 4, 5, 6])


def test_it_is_not_asked_where_triton_does_not_serve(device: torch.device) -> None:
    from crossan_fast.training import step

    model = CrossanModel(CrossanConfig(MODALITIES), backend="eager")
    assert not step._triton_judges(model, list(model.parameters()))
