"""Ratios that must hold with a wide margin on any machine; never absolute times.

The paper's 704 items in fp32, forward + backward: the compiled side network against the plain one. About half
of what benchmarks/results has is asked, of the best of three tries, since a busy machine slows either.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing
from benchmarks.cases.side_network import PAPER_ITEMS, Shape, build_side_network
from benchmarks.registry import Setting
from crossan_fast.ops import BackendUnavailable

ASKED, TRIES = 1.5, 3


@pytest.mark.long
@pytest.mark.slow
def test_the_compiled_side_network_is_faster_than_the_plain_one():
    cpu = torch.device("cpu")
    workload = build_side_network(Shape(PAPER_ITEMS), Setting(cpu, torch.float32))
    runnables = {name: workload.implementations[name]() for name in ("eager", "cpp")}
    try:
        workload.check("cpp", runnables["cpp"])
    except BackendUnavailable as reason:
        pytest.skip(f"the compiled backend can't be built here: {reason}")
    ratios = []
    for _ in range(TRIES):
        samples = timing.interleaved(runnables, cpu, workload.sets, seconds=0.0, minimum=5)
        # The quickest call of each: a neighbour only ever adds to a time.
        ratios.append(min(samples["eager"].passes["both"]) / min(samples["cpp"].passes["both"]))
        if ratios[-1] >= ASKED:
            return
    pytest.fail(f"side_network, 704 items, fp32: expected at least {ASKED}× eager, got {ratios}")
