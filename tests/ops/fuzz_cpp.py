"""Random shapes, strides, types and ids through every compiled CPU op; .ci/sanitize runs it sanitized.

Right arguments must give results of the right shapes, wrong ones an exception; the sanitizers watch every
access.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import calls

from crossan_fast import _build
from crossan_fast.ops._dispatch import OPS

REFUSED = (ValueError, TypeError, IndexError, RuntimeError)


def main(count: int, seed: int) -> None:
    _build.load("cpu")
    library = torch.ops.crossan_fast_cpp
    ops = {op: calls.of(op) for op in OPS if _build.has_source("cpu", op)}
    random.seed(seed)
    torch.manual_seed(seed)
    print(f"{count} calls of seed {seed} to {', '.join(ops)}", flush=True)
    refused = 0
    ways = ["fp32", "brgemm" if library.has_brgemm() else "auto"]
    for _ in range(count):
        torch.set_num_threads(random.choice([1, 2, 3]))
        # Either way of bf16, whichever this CPU would choose.
        os.environ["CROSSAN_FAST_CPU_BF16"] = random.choice(ways)
        op = random.choice(list(ops))
        arguments = ops[op].draw()
        try:
            ops[op].follow(library, arguments, getattr(library, op)(*arguments))
        except REFUSED:
            refused += 1
    print(f"{refused} refused")
    if refused > count / 2:
        raise SystemExit("more than half of the runs were refused: the fuzz itself is wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
