"""csrc/cpu's operands of bf16 products against the definition, by number and by width of vectors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from crossan_fast import _build

PROGRAM = r"""
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/pairs.h"

using namespace crossan_fast;

std::mt19937 random_bits(1);

// To nearest even; what is no number stays none.
uint16_t rounded(float value) {
  if (std::isnan(value)) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t low = bits & 0xffffu, high = bits >> 16;
  return static_cast<uint16_t>(high + (low > 0x8000u || (low == 0x8000u && high % 2 == 1)));
}

float number() {
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 3.4028235e38f, 1e-45f, 1.17549435e-38f};
  if (random_bits() % 8 == 0) return special[random_bits() % 8];
  return std::bit_cast<float>(static_cast<uint32_t>(random_bits()));
}

int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint32_t>(end)); }

// A [rows, depth] or its like across, no longer than it has to be.
std::vector<float> matrix(int64_t lines, int64_t line, int64_t across) {
  std::vector<float> numbers(static_cast<size_t>(lines > 0 ? (lines - 1) * line + across : 0));
  for (float& x : numbers) x = number();
  return numbers;
}

bool left_side(int64_t rows, int64_t depth, bool turned) {
  const int64_t line = (turned ? rows : depth) + below(5);
  const int64_t row = turned ? 1 : line, column = turned ? line : 1;
  const auto a = turned ? matrix(depth, line, rows) : matrix(rows, line, depth);
  std::vector<uint16_t> got(static_cast<size_t>(rows * left_row_of(depth)), 0xdead);
  pack_left(rows, depth, a.data(), row, column, got.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < even(depth); ++k)
      if (got[static_cast<size_t>(i * left_row_of(depth) + k)] !=
          (k < depth ? rounded(a[static_cast<size_t>(i * row + k * column)]) : 0))
        return false;
  return true;
}

bool right_side(int64_t depth, int64_t columns, bool turned) {
  const int64_t line = (turned ? depth : columns) + below(5);
  const int64_t row = turned ? 1 : line, column = turned ? line : 1;
  const auto b = turned ? matrix(columns, line, depth) : matrix(depth, line, columns);
  std::vector<uint16_t> got(static_cast<size_t>(pairs_size(depth, columns)), 0xdead), expected;
  pack_pairs(b.data(), row, column, depth, columns, got.data());
  for (int64_t first = 0; first < columns; first += kPairPanel) {
    const int64_t count = std::min(kPairPanel, columns - first);
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t j = 0; j < pair_row(count); ++j)
        for (int64_t at = k; at < k + 2; ++at) {
          const auto place = static_cast<size_t>(at * row + (first + j) * column);
          expected.push_back(j < count && at < depth ? rounded(b[place]) : uint16_t{0});
        }
  }
  return got == expected;
}

int main() {
  int wrong = 0;
  for (int round = 0; round < 1500; ++round)
    for (const bool turned : {false, true}) {
      wrong += !left_side(below(140) + 1, below(75), turned);
      wrong += !right_side(below(75), below(140) + 1, turned);
    }
  std::printf("%d wrong of 6000\n", wrong);
}
"""


@pytest.mark.sweep(1)
@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
@pytest.mark.skipif(shutil.which(_build.compiler()) is None, reason="no C++ compiler")
def test_operands_are_rounded_and_laid_out_as_defined(march: str, tmp_path: Path) -> None:
    """Odd sizes, padded rows, buffers without a number to spare, NaN and inf."""
    if march != "native" and "avx2" not in _build.cpu_flags():
        pytest.skip("no x86-64 with AVX2")
    (tmp_path / "pairs.cpp").write_text(PROGRAM)
    program = tmp_path / "pairs"
    command = [_build.compiler(), "-std=c++20", "-O1", f"-march={march}", "-fsanitize=address,undefined"]
    command += [f"-I{_build.CSRC}", "-o", str(program), str(tmp_path / "pairs.cpp")]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong of 6000\n", "")
