"""A varying batch must not compile anew: kernels depend on sizes through a few buckets, not through numbers.

Every launch of a training run's sizes is really compiled (small widths; a process of its own, as this one's
kernels are the interpreter's), and the different machine codes are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from collections import defaultdict
import torch
from benchmarks import aot_cases
from benchmarks.aot_cases import full_loss, fusion, in_batch_loss
from crossan_fast.kernels._common import record_launches
from crossan_fast.kernels import side_network
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights

def network(n):
    towers, levels, rank, width = 2, 2, 16, 64
    structure = SideNetworkStructure((width,) * towers, ((0,), (1,)))
    shapes = ((levels, rank, width), (levels, rank), (levels, width, rank), (levels, width), (levels,))
    shapes += ((64, width), (64,))
    groups = [[aot_cases.new(*shape)] * towers for shape in shapes]
    weights = SideNetworkWeights(*groups, cross_gate=[aot_cases.new(levels)] * 2)
    rest = ([aot_cases.new(500, levels, width)] * towers, [], aot_cases.new(n, kind=torch.int64), None)
    rest = (*rest, weights.flatten(), *structure.static, torch.bfloat16)
    side_network.backward(*side_network.forward(*rest), *rest)

def everything(n):
    network(n)
    fusion.call(n, torch.bfloat16)
    in_batch_loss.call(n, n + 3, torch.bfloat16)
    full_loss.call(n, torch.bfloat16)

counts = {}
for sizes in json.loads(sys.argv[1]):
    kernels = defaultdict(set)
    with record_launches(90) as launches:
        for n in sizes:
            (network if len(sys.argv) == 3 else everything)(n)
    for one in launches:
        kernels[one.name].add(id(one.compiled))
    counts[str(sizes)] = {name: len(found) for name, found in kernels.items()}
print(json.dumps(counts))
"""


def specialisations(sizes: list[list[int]], tmp_path: Path, *only: str) -> list[dict[str, int]]:
    """Per list of sizes, how many different codes each kernel has."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(sizes), *only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


@pytest.mark.long
def test_sizes_of_one_bucket_share_every_kernel(tmp_path):
    """Multiples of 16 and odd ones, the bucket's ends and its inside."""
    (counts,) = specialisations([[513, 528, 701, 1023, 1024]], tmp_path)
    # Ops name their kernels alike. A loss's walk is split over programs or not, a gradient's size is a
    # multiple of 16 or not; fusion, both losses and the side network have the other names in common.
    shared = {"forward_kernel": 3, "combine_kernel": 3, "count_kernel": 2, "sum_parts_kernel": 2}
    shared |= {"backward_rows_kernel": 4, "backward_columns_kernel": 4}
    for name, count in counts.items():
        assert count <= shared.get(name, 1), (name, count)


@pytest.mark.long
@pytest.mark.slow
def test_all_sizes_share_few_kernels(tmp_path):
    """From one item to 40,000: split or fused, first or later chunk of items, and nothing else."""
    sizes = [1, 2, 16, 17, 255, 256, 700, 2048, 3000, 5000, 8193, 20314, 40000]
    (counts,) = specialisations([sizes], tmp_path, "network")
    assert counts.pop("down_gradient_kernel") <= 2 and counts.pop("mixing_gradient_kernel") <= 2
    assert counts.pop("grad_walk_kernel") <= 2
    assert all(count == 1 for count in counts.values()), counts
    assert {"fused_kernel", "down_kernel", "walk_kernel"} <= set(counts)
