"""What marks functions for the compiler: the compiler's own mark, without its import."""

from __future__ import annotations

import subprocess
import sys

import torch

from crossan_fast._compiling import constant_in_graphs


def test_the_mark_is_torchs() -> None:
    def one() -> int:
        return 1

    def two() -> int:
        return 1

    assert vars(constant_in_graphs(one)) == vars(torch.compiler.assume_constant_result(two)) != {}


def test_importing_the_library_imports_no_compiler() -> None:
    script = "import sys, crossan_fast; print(*(name in sys.modules for name in ('torch._dynamo', 'triton')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"], done.stdout
