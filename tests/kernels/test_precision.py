"""fp32 products follow torch's own switch: what the host reads at a launch is what kernels are told."""

from __future__ import annotations

import pytest
import torch

from crossan_fast.kernels import rank_of_target
from crossan_fast.kernels._common import dot_precision


@pytest.mark.parametrize(("legacy", "told"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_switch(matmul_switch, legacy, told):
    """Torch documents TF32 for CUDA, and no other type, for "high" and for "medium"."""
    torch.set_float32_matmul_precision(legacy)
    try:
        assert dot_precision(torch.float32) == told
        assert dot_precision(torch.bfloat16) == dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("told", ["tf32", "ieee"])
def test_every_launch_reads_it(matmul_switch, monkeypatch, device, told):
    """Not the first alone: a run turns it between its steps and their evaluation."""
    passed = []
    whole = rank_of_target.launch

    def launch(kernel, grid, *args, **options):
        passed.append(options.get("PRECISION"))
        whole(kernel, grid, *args, **options)

    monkeypatch.setattr(rank_of_target, "launch", launch)
    users, items = torch.randn(5, 16, device=device), torch.randn(9, 16, device=device)
    target = torch.arange(1, 6, device=device)
    for setting in ("ieee", "tf32", told):
        matmul_switch.fp32_precision = setting
        rank_of_target.forward(users, items, target, None)
    assert [p for p in passed if p] == ["ieee", "tf32", told]
