"""The turns of the C++ core's blocks: a block that throws ends everyone who waits for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from crossan_fast import _build

PROGRAM = r"""
#include "cpu/turns.h"

#include <cstdio>
#include <stdexcept>
#include <vector>

// Blocks of 3 steps on 4 threads; the block of `bad` throws in its second step, before its turn.
int main() {
  for (int bad = 0; bad < 8; ++bad) {
    crossan_fast::Turns turns(8);
    std::atomic<int64_t> next{0};
    std::atomic<int> told{0}, other{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&] {
        try {
          for (int64_t b; (b = next.fetch_add(1)) < 8;)
            turns.guard([&] {
              for (int64_t step = 0; step < 3; ++step) {
                if (b == bad && step == 1) throw std::runtime_error("block");
                turns.wait(b, step);
                turns.pass(b, step);
              }
            });
        } catch (const std::runtime_error&) {
          ++told;
        } catch (...) {
          ++other;
        }
      });
    for (auto& thread : threads) thread.join();
    if (told < 1 || other > 0) return 1;
  }
  std::puts("done");
}
"""


@pytest.mark.skipif(shutil.which(_build.compiler()) is None, reason="no C++ compiler")
def test_a_block_that_throws_stops_those_that_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "turns.cpp").write_text(PROGRAM)
    program = tmp_path / "turns"
    command = [_build.compiler(), "-std=c++20", "-pthread", f"-I{_build.CSRC}", "-o", str(program)]
    subprocess.run([*command, str(tmp_path / "turns.cpp")], check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "done\n")
