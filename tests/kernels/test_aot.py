"""Kernels compile for GPUs that are not here: no spills, shared memory within limits, matrix instructions.

Really compiled, in processes of their own (this one's kernels are the interpreter's): the hot kernels of a
step's side network in bf16 for sm_90, with the configs that the host function chooses for the paper's size;
in `.ci/long` those of every op, of wider towers (D = 1,024 and 4,096), one in fp32 under torch's switch for
TF32, and all for sm_80. The full table (sm_89, 8-bit caches, fp32, more items, other kinds of network,
kernels that are not hot) is made by `benchmarks/aot.sh`, and its rows are what the figures here are
compared with. Where it has none by the installed Triton, limits alone are checked. `.ci/triton` compiles
networks of kinds that the paper's is not.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# Parts of the names of benchmarks.aot's cases, and of those that `.ci/long` compiles as well.
CASES = (
    "side_network n=704 D=768 r=64 bf16",
    "side_network n=20314 D=768 r=64 bf16",
    "fusion n=704 d=64 bf16",
    "sequence_encoder B=64 S=10 d=64 bf16",
    "in_batch_loss rows=640 columns=704 d=64 bf16",
    "full_loss rows=640 columns=20315 d=64 bf16",
    "topk_scores k=10 d=64 bf16",
    "rank_of_target d=64 bf16",
)
MORE_CASES = (
    "side_network n=8192 D=1024 r=64 bf16",
    "side_network n=8192 D=4096 r=64 bf16",
    "fusion n=20314 d=64 bf16",
    "rank_of_target d=64 tf32",
)
SMALL = ("down_kernel", "walk_kernel")
GRADIENTS = ("grad_walk_kernel", "mixing_gradient_kernel", "down_gradient_kernel")
LOSS = ("forward_kernel", "backward_rows_kernel", "backward_columns_kernel")
KERNELS = {
    "side_network n=704": (*SMALL, *GRADIENTS),
    "side_network": ("fused_kernel", *GRADIENTS),
    "fusion": ("forward_kernel", "items_kernel", "router_kernel", "experts_kernel"),
    "sequence_encoder": ("forward_kernel", "backward_kernel", "sums_kernel"),
    "in_batch_loss": LOSS,
    "full_loss": LOSS,
    "topk_scores": ("topk_kernel",),
    "rank_of_target": ("rank_kernel",),
}


def compile_cases(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # Triton's cache keeps what is unchanged
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.aot", "--check", "--jobs", "2", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_case_that_does_not_compile_is_named(monkeypatch):
    from benchmarks import aot

    def run():
        raise ValueError("no slices")

    monkeypatch.setattr(aot, "AOT_CASES", (aot.Case("network", "bf16", run),))
    monkeypatch.setattr(aot, "record_launches", lambda *rest: contextlib.nullcontext([]))
    assert aot._compile_numbered((0, 90, False)) == (
        [],
        "sm_90 network bf16 does not compile: ValueError: no slices",
    )


@pytest.mark.parametrize(
    ("arch", "cases"),
    [
        pytest.param("90", CASES[:1], marks=pytest.mark.slow, id="sm_90, a step's side network"),
        pytest.param("90", CASES, marks=pytest.mark.long, id="sm_90"),
        pytest.param("80", CASES, marks=pytest.mark.long, id="sm_80"),
        pytest.param("90", MORE_CASES, marks=pytest.mark.long, id="sm_90, more"),
        pytest.param("80", MORE_CASES, marks=pytest.mark.long, id="sm_80, more"),
    ],
)
def test_hot_kernels_compile_within_their_limits(arch, cases):
    done = compile_cases("--hot", "--arch", arch, "--only", *cases)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for case in cases:
        name, dtype = case.rsplit(" ", 1)
        kernels = next(kernels for start, kernels in KERNELS.items() if name.startswith(start))
        for kernel in kernels:
            compiled = any(
                line.startswith(f"sm_{arch}  {name} ") and f" {dtype}  {kernel} " in line for line in lines
            )
            assert compiled, f"sm_{arch} {case}: {kernel} was not compiled"


def test_a_figure_that_changed_is_reported():
    """The comparison itself: each figure alone, a kernel that the table lacks, and cases it has no row of."""
    from benchmarks import aot

    row = aot.Row("sm_90", "3.9.0", "case", "bf16", "k", 4, 100, 0, 1024, 8, 0, 0, 0, 0, 0)
    table = [{key: str(value) for key, value in vars(row).items()}]
    assert aot.differences([row], table) == []
    for name, value, reported in (
        ("registers", 108, False),
        ("registers", 109, True),
        ("shared_bytes", 1040, True),
        ("hgmma", 7, True),
        ("kernel", "other", True),
        ("triton", "3.6.0", False),
        ("case", "other", False),
    ):
        changed = aot.Row(**{**vars(row), name: value})
        assert bool(aot.differences([changed], table)) == reported, name


def test_rows_of_several_tritons_stand_side_by_side(monkeypatch, tmp_path):
    """Only rows of what was compiled, by the Triton that compiled it, are replaced and compared."""
    from benchmarks import aot

    monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.csv")
    monkeypatch.setattr(aot, "AOT_CASES", (aot.Case("case", "bf16", print), aot.Case("case", "fp16", print)))

    def row(triton, registers, dtype="bf16"):
        return aot.Row("sm_90", triton, "case", dtype, "k", 4, registers, 0, 1024, 8, 0, 0, 0, 0, 0)

    for version, dtype, registers in (
        ("3.6.0", "bf16", 64),
        ("3.6.0", "fp16", 32),
        ("3.9.0", "bf16", 128),
        ("3.6.0", "bf16", 96),
    ):
        monkeypatch.setattr(aot.triton, "__version__", version)
        aot._write([row(version, registers, dtype)], 90, next(c for c in aot.AOT_CASES if c.dtype == dtype))
    table = aot.recorded()
    assert [(r["triton"], r["dtype"], r["registers"]) for r in table] == [
        ("3.6.0", "bf16", "96"),
        ("3.6.0", "fp16", "32"),
        ("3.9.0", "bf16", "128"),
    ]
    assert aot.differences([row("3.6.0", 96), row("3.9.0", 128)], table) == []
    assert len(aot.differences([row("3.6.0", 128), row("3.9.0", 96)], table)) == 2
    assert aot.differences([row("3.8.0", 128), row("3.9.0", 64, "fp16")], table) == []
