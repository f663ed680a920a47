"""An op planted by the steps of CONTRIBUTING.md is found by everything that walks over the ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crossan_fast import _build

ROOT = Path(__file__).parents[1]

OP = '''
"""row_sums: the sum of each row."""

import torch

from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define, on_one_device


def row_sums_reference(x):
    return x.sum(dim=1)


@on_one_device
def row_sums(x, *, backend="auto"):
    choice = choose("row_sums", x.device.type, x.dtype, (), backend)
    return row_sums_reference(x) if choice.backend == "eager" else _row_sums(x, choice.backend)


def _fake(x):
    return x.new_empty(x.shape[:1])


_row_sums = define("row_sums(Tensor x) -> Tensor", _fake)
'''

KERNEL = '''
"""row_sums in Triton."""

import triton
import triton.language as tl

from crossan_fast.kernels._common import launch


@triton.jit
def row_sums_kernel(x, sums, columns, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * columns + index, mask=index < columns, other=0)  # [BLOCK]
    tl.store(sums + row, tl.sum(values.to(tl.float32), axis=0))


def forward(x):
    sums = x.new_empty(x.shape[:1])
    launch(row_sums_kernel, (x.shape[0],), x.contiguous(), sums, x.shape[1], BLOCK=1024)
    return sums
'''

CPP = """
// row_sums, from its border to its end.
#include "border.h"
#include "library.h"

namespace crossan_fast::border {

Tensor row_sums(const Tensor& x) {
  check_device("x", x, at::kCPU);
  check_type("x", x, {at::kFloat});
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected [rows, columns], got ", described(x));
  const Tensor rows = x.contiguous();
  Tensor sums = zeros({x.size(0)}, at::kFloat);
  for (int64_t r = 0; r < x.size(0); ++r)
    for (int64_t c = 0; c < x.size(1); ++c)
      sums.mutable_data_ptr<float>()[r] += rows.const_data_ptr<float>()[r * x.size(1) + c];
  return sums;
}

}  // namespace crossan_fast::border
"""

CALLS = '''
"""row_sums: any matrix."""

import random

from calls import values


def draw():
    return (values(random.randint(0, 5), random.randint(0, 9)),)


def follow(library, arguments, results):
    assert results.shape == arguments[0].shape[:1]
'''

AOT = '''
"""row_sums: one size."""

from functools import partial

from benchmarks.aot_cases import Case, new
from crossan_fast.kernels import row_sums


def cases():
    run = partial(row_sums.forward, new(64, 700))
    yield Case("row_sums n=64", "bf16", run, frozenset({"row_sums_kernel"}))
'''


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """The tree as a wheel lays it out, with the files and lines of one op more."""
    for source, target in (
        ("crossan_fast", "crossan_fast"),
        ("kernels", "crossan_fast/kernels"),
        ("csrc", "crossan_fast/csrc"),
        ("benchmarks", "benchmarks"),
        ("tests/helpers", "tests/helpers"),
    ):
        ignore = shutil.ignore_patterns("__pycache__", "results", "cuda", "_libraries")
        shutil.copytree(ROOT / source, tmp_path / target, ignore=ignore)
    (tmp_path / "benchmarks" / "results").mkdir()
    ops = tmp_path / "tests" / "ops"
    ops.mkdir()
    for name in ("fuzz_cpp.py", "test_contracts.py"):
        shutil.copy(ROOT / "tests" / "ops" / name, ops / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    csrc = tmp_path / "crossan_fast" / "csrc" / "cpu"
    for path, text in (
        (tmp_path / "crossan_fast" / "ops" / "row_sums.py", OP),
        (tmp_path / "crossan_fast" / "kernels" / "row_sums.py", KERNEL),
        (csrc / "row_sums.cpp", CPP),
        (tmp_path / "tests" / "helpers" / "calls" / "row_sums.py", CALLS),
        (tmp_path / "benchmarks" / "aot_cases" / "row_sums.py", AOT),
    ):
        assert not path.exists()
        path.write_text(text.lstrip())
    for path, behind, line in (
        (csrc / "library.h", "Tensor rank_of_target(", "Tensor row_sums(const Tensor& x);\n"),
        (csrc / "library.cpp", '  ops.def("rank_of_target(', '  ops.def("row_sums(Tensor x) -> Tensor");\n'),
        (csrc / "library.cpp", '  ops.impl("rank_of_target",', '  ops.impl("row_sums", border::row_sums);\n'),
        (tmp_path / "crossan_fast" / "ops" / "__init__.py", "from crossan_fast.ops.sequence_encoder import",
         "from crossan_fast.ops.row_sums import row_sums, row_sums_reference  # noqa: F401\n"),
    ):  # fmt: skip
        text = path.read_text()
        assert text.count(behind) == 1, behind
        path.write_text(text.replace(behind, line + behind))
    return tmp_path


@pytest.mark.long
@pytest.mark.skipif(_build.PARTS["cpu"].missing() is not None, reason="cannot build")
def test_a_planted_op_is_found_by_all_that_walks_over_the_ops(planted: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{planted}{os.pathsep}{planted / 'tests' / 'helpers'}",
        "CROSSAN_FAST_BUILD_DIR": str(planted / "build"),
        "CROSSAN_FAST_CXXFLAGS": "-O0",  # as fast as it compiles
        "TRITON_CACHE_DIR": str(planted / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=planted, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    assert "row_sums" in run("tests/ops/fuzz_cpp.py", "60", "0").splitlines()[0]  # builds the library, too
    assert "row_sums         cpp (" in run("-m", "crossan_fast", "doctor")
    assert "2 passed" in run(
        "-m", "pytest", "-p", "no:cacheprovider", "tests/ops/test_contracts.py", "-k", "row_sums"
    )
    compiled = run(
        "-c",
        "from benchmarks import aot\n"
        "cases = [case for case in aot.AOT_CASES if case.name.startswith('row_sums')]\n"
        "rows = [row for case in cases for row in aot.compile_case(case, 90)]\n"
        "print([row.kernel for row in rows], aot.failures(rows, cases))\n",
    )
    assert compiled.strip() == "['row_sums_kernel'] []"
    backends = run(
        "-c",
        "import torch\nfrom crossan_fast.ops import row_sums, row_sums_reference\n"
        "x = torch.arange(12.).view(3, 4)\n"
        "print(torch.equal(row_sums(x, backend='cpp'), row_sums_reference(x)))\n",
    )
    assert backends.strip() == "True"
