"""Triton's own launcher gets a whole step's launches right, and what would go wrong on a device is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import crossan_fast._losses
from benchmarks import launches
from benchmarks.pretended_gpu import GPU, PretendedGpu
from benchmarks.pretended_gpu.driver import Launch, pretended_driver
from crossan_fast import CrossanConfig, Modality
from crossan_fast.kernels._common import launch
from crossan_fast.kernels._streaming_softmax import mean_kernel
from crossan_fast.training.train_config import ComputePrecision

MODALITIES = (Modality("text", 32, 2), Modality("image", 32, 2))
SMALL = launches.Case(
    "small", CrossanConfig(MODALITIES, bottleneck=16, embedding_dim=16, window=4), users=4, items=20
)


@pytest.mark.parametrize(("loss", "precision"), [("in_batch", "bf16"), ("full", "fp32")])
def test_a_step_is_launched(loss: str, precision: ComputePrecision) -> None:
    """`count` checks each launch, and that the host never waits."""
    case = replace(SMALL, config=replace(SMALL.config, loss=loss), precision=precision)
    counts = {(row.part, row.passes): row for row in launches.count(case)}
    for part in ("side_network", "fusion", "loss"):
        assert all(counts[part, passes].triton_launches for passes in ("forward", "backward"))
    assert counts["optimizer", "update"].torch_ops


def test_a_planted_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return table[index] * table.sum().item()

    monkeypatch.setattr(crossan_fast._losses, "rows_of", waits)
    with pytest.raises(
        AssertionError, match=r"small: the host waits for the device at .*_local_scalar_dense"
    ):
        launches.count(replace(SMALL, config=replace(SMALL.config, loss="full")), compiling=False)


@pytest.fixture
def launched() -> Iterator[list[Launch]]:
    found: list[Launch] = []
    with pretended_driver(found.append), PretendedGpu():
        yield found


def mean(*grid: int, loss_on: torch.device = GPU, programs: int = 5) -> None:
    launch(
        mean_kernel, grid, torch.zeros(5, 2, device=GPU), torch.zeros((), device=loss_on), programs, BLOCK=16
    )


def test_a_launch_is_recorded(launched: list[Launch]) -> None:
    mean(3, 2)
    assert launched == [Launch("mean_kernel", (3, 2, 1), 4, launched[0].shared)]


def test_faults_of_a_launch_are_found(launched: list[Launch]) -> None:
    with pytest.raises(ValueError, match="cpu tensor"):
        mean(1, loss_on=torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"mean_kernel: nothing was launched on grid \(0,\)"):
        mean(0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        mean(1, 70_000)
    assert launched == []


def test_a_step_of_the_paper_s_size_launches_what_is_recorded() -> None:
    """Only counted, which compiles nothing; with the versions that recorded it, else nothing is compared."""
    assert launches.differences(launches.count(launches.CASES[0], compiling=False), launches.recorded()) == []


def test_a_count_that_changed_is_reported() -> None:
    row = launches.Row("2.13", "3.9.0", "case", "bf16", "loss", "forward", 3, 1)
    other = launches.Row("2.13", "3.9.0", "case", "bf16", "loss", "forward", 4, 1)
    elsewhere = launches.Row("2.13", "3.10.0", "case", "bf16", "loss", "forward", 4, 1)
    assert launches.differences([row], [row]) == launches.differences([row], [elsewhere]) == []
    assert len(launches.differences([row], [other])) == len(launches.differences([row], [])) == 1
