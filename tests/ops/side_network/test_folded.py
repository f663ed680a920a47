"""The compiled side_network, which applies heads before up-projections in all but narrow towers, against the
definition in float64.

Sizes lie on both sides of the kernels' slices, panels and vectors, and gates within 1e-13 of 0 and of 1:
the algebra may divide by neither.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_ops import assert_same_bits_on_any_threads, needs_cpp
from side_networks import (
    PAIRS,
    SINGLES,
    STRUCTURES,
    assert_no_worse_than_eager,
    compiled,
    in_dtype,
    make_states,
    make_weights,
    outputs_and_grads,
)

from crossan_fast.ops import SideNetworkStructure, side_network_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]

# θ / τ = ±30: μ is 1e-13 short of 1 and of 0; ±10, and half open.
GATES = (3.0, -3.0, 1.0, 0.0, -1.0)
NINE = tuple((m,) for m in range(9))
TWO_AND_A_PAIR = ((0,), (1,), (1, 0))

# structure, levels, rank, d
CASES = {
    "one level": (SideNetworkStructure((96, 70), SINGLES[:2]), 1, 16, 8),
    "one tower": (SideNetworkStructure((33,), SINGLES[:1], "none"), 4, 5, 7),
    "no cross": (SideNetworkStructure((64, 33), SINGLES[:2], "none", "relu"), 4, 16, 24),
    "the papers' levels": (SideNetworkStructure((192, 192, 192), SINGLES), 7, 64, 48),
    "thirteen levels": (SideNetworkStructure((110, 71), SINGLES[:2]), 13, 9, 65),
    "wide": (SideNetworkStructure((768, 768), SINGLES[:2]), 3, 64, 64),
    "wider, by no vector": (SideNetworkStructure((1027, 770), SINGLES[:2], "backbone", "relu"), 2, 24, 70),
    "nine modalities": (SideNetworkStructure((24,) * 9, NINE), 3, 8, 5),
    "nine of two widths": (SideNetworkStructure((24, 17, 24) * 3, NINE), 2, 3, 12),
    "low rank": (SideNetworkStructure((96, 70, 96), SINGLES, cross_projection="low_rank"), 4, 16, 24),
    "equal pairs": (SideNetworkStructure((80, 80, 80), PAIRS, "none", "relu"), 4, 16, 20),
    "unequal pairs": (SideNetworkStructure((128, 300), TWO_AND_A_PAIR, "none"), 3, 16, 8),
    "pairs beside a cross": (SideNetworkStructure((33, 70, 33), PAIRS), 4, 7, 19),
    # Those below walk with h itself.
    "narrow": (SideNetworkStructure((96, 96, 96), SINGLES), 7, 64, 48),
    "narrow, thirteen levels": (SideNetworkStructure((40, 21), SINGLES[:2]), 13, 9, 65),
    "narrow, no cross": (SideNetworkStructure((64, 33), SINGLES[:2], "none", "relu"), 5, 40, 24),
    "narrow, nine modalities": (SideNetworkStructure((24,) * 9, NINE), 3, 32, 12),
    "narrow, low rank": (SideNetworkStructure((48, 35, 48), SINGLES, cross_projection="low_rank"), 4, 32, 24),
    "narrow, unequal pairs": (SideNetworkStructure((40, 70), TWO_AND_A_PAIR, "none"), 3, 48, 33),
    "narrow, pairs beside a cross": (SideNetworkStructure((33, 70, 33), PAIRS), 4, 40, 19),
    "side": (SideNetworkStructure((96, 96, 96), SINGLES, "side"), 7, 16, 24),
    "side, unequal widths and pairs": (SideNetworkStructure((33, 70, 33), PAIRS, "side", "relu"), 4, 7, 19),
    "side, wide": (SideNetworkStructure((768, 768), SINGLES[:2], "side"), 2, 64, 64),
}


def with_gates(weights, shift: int = 0):
    """Every pattern of neighbouring levels comes up in some tower."""
    gates = [
        torch.tensor([GATES[(level + t + shift) % len(GATES)] for level in range(len(theta))])
        for t, theta in enumerate(weights.gate)
    ]
    return in_dtype(weights._replace(gate=gates), torch.float64)


def assert_equal_by_size(got, expected, tolerance: float) -> None:
    """Entries err by at most `tolerance` of their tensor's largest."""
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        scale = float(y.abs().max())
        torch.testing.assert_close(
            x, y, rtol=0, atol=tolerance * scale + 1e-300, msg=lambda m, i=index: f"{i}: {m}"
        )


@pytest.mark.parametrize("gates", ["open and closed", "drawn"])
@pytest.mark.parametrize("missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_definitions(name, missing, gates):
    structure, levels, rank, embedding = CASES[name]
    weights = make_weights(structure, levels, rank, embedding)
    states = make_states(structure, 150, levels)
    if gates == "open and closed":
        weights = with_gates(weights, int(missing))
    generator = torch.Generator().manual_seed(3)
    present = torch.rand(150, len(structure.widths), generator=generator) > 0.3 if missing else None
    got = outputs_and_grads(compiled, states, weights, structure, present=present)
    expected = outputs_and_grads(side_network_reference, states, weights, structure, present=present)
    assert_equal_by_size(got, expected, 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_each_case_walks_as_it_is_named(name):
    """What is kept of the weights tells: links, or nothing."""
    structure, levels, rank, embedding = CASES[name]
    weights, states = make_weights(structure, levels, rank, embedding), make_states(structure, 3, levels)
    kept = torch.ops.crossan_fast.side_network(
        states, [], None, None, weights.flatten(), *structure.static, torch.float64, "cpp"
    )[2]
    assert (kept.numel() == 0) == name.startswith(("narrow", "side"))


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "name",
    [
        "the papers' levels",
        "side",
        pytest.param("thirteen levels", marks=pytest.mark.long),
        pytest.param("equal pairs", marks=pytest.mark.long),
        pytest.param("narrow", marks=pytest.mark.long),
    ],
)
def test_error_at_open_and_closed_gates_is_no_worse_than_eagers(name):
    structure, levels, rank, embedding = CASES[name]
    weights = in_dtype(with_gates(make_weights(structure, levels, rank, embedding)), torch.float32)
    states = [s.float() for s in make_states(structure, 150, levels)]
    assert_no_worse_than_eager(states, weights, structure, draws=4)


@pytest.mark.parametrize("theta", [1e4, -1e4], ids=["open", "closed"])
@pytest.mark.parametrize("rank", [6, 40], ids=["by links", "with h"])
@pytest.mark.parametrize("cross", ["none", "backbone", "side"])
def test_gates_that_saturate_leave_finite_gradients(cross, rank, theta):
    """μ is exactly 1, or 0: what h a level carries over is all or nothing."""
    structure = SideNetworkStructure((20, 20), SINGLES[:2], cross)
    weights, states = make_weights(structure, 4, rank), make_states(structure, 70, 4)
    gates = [torch.full_like(gate, theta) for gate in weights.gate]
    weights = in_dtype(weights._replace(gate=gates), torch.float64)
    got = outputs_and_grads(compiled, states, weights, structure)
    assert all(t.isfinite().all() for t in got)
    expected = outputs_and_grads(side_network_reference, states, weights, structure)
    assert_equal_by_size(got, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [6, 40], ids=["by links", "with h"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_tower_without_a_present_source_gives_zeros(name, rank, dtype):
    structure = STRUCTURES[name]
    weights = in_dtype(make_weights(structure, 3, rank), dtype)
    states = [s.to(dtype) for s in make_states(structure, 150, 3)]
    generator = torch.Generator().manual_seed(3)
    present = torch.rand(150, len(structure.widths), generator=generator) > 0.5
    exists = torch.stack([present[:, list(s)].any(dim=1) for s in structure.sources], dim=1)
    e = compiled(states, weights, structure, present=present)
    assert not e[~exists].any() and e[exists].any(dim=1).all()
    # Nor does a weight learn from such a tower.
    grads = torch.autograd.grad(e[~exists].sum(), weights.flatten(), materialize_grads=True)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize(
    "name", ["the papers' levels", "nine modalities", "unequal pairs", "narrow, low rank", "side"]
)
def test_bits_do_not_depend_on_threads_and_repeat(name, missing):
    structure, levels, rank, embedding = CASES[name]
    rows = 700  # several blocks of items, the last not full
    weights = in_dtype(make_weights(structure, levels, rank, embedding), torch.float32)
    states = [s.float() for s in make_states(structure, rows, levels)]
    present = torch.arange(rows * len(states)).reshape(rows, -1) % 3 > 0 if missing else None
    assert_same_bits_on_any_threads(
        lambda: outputs_and_grads(compiled, states, weights, structure, present=present)
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("rank", [6, 40], ids=["by links", "with h"])
@pytest.mark.parametrize("name", ["backbone", "unequal widths, side", "pairs"])
def test_compiles_whole_and_keeps_its_schema(name, rank):
    """What is kept for the backward has the shapes and types that the fake implementation promises."""
    structure, levels = STRUCTURES[name], 3
    weights, states = make_weights(structure, levels, rank), make_states(structure, 9, levels)
    arguments = (states, [], torch.tensor([1, 5, 5, 0, 8]), None, weights.flatten(), *structure.static)
    torch.library.opcheck(torch.ops.crossan_fast.side_network.default, (*arguments, torch.float64, "cpp"))
    flat = [w.float().detach().requires_grad_() for w in weights.flatten()]
    states = [s.float() for s in states]

    def call(ids):
        return compiled(states, structure.unflatten(flat), structure, ids=ids)

    whole = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (torch.tensor([1, 5, 5, 0, 8]), torch.tensor([2, 3]), torch.arange(9).repeat(30)):
        (have, grads), (want, expected) = (
            (e, torch.autograd.grad(e.square().sum(), flat)) for e in (whole(ids), call(ids))
        )
        assert torch.equal(have, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.sweep(1)
# Of 2 towers and modalities in float64 and blocks of 75 items: slices of 64, 192 and 256 columns.
@pytest.mark.parametrize("kilobytes", ["1", "256", "1024"])
def test_every_size_of_l2_gives_the_definition(kilobytes):
    """In a process of its own: the size is read once. Others' CPUs cut D into other slices than this one."""
    script = """
import torch
from crossan_fast import _build
from crossan_fast.ops import SideNetworkStructure, side_network_reference
from side_networks import SINGLES, compiled, make_states, make_weights, outputs_and_grads
torch.manual_seed(0)
structure = SideNetworkStructure((500, 500), SINGLES[:2])
weights = make_weights(structure, 3, 8)
states = make_states(structure, 150, 3)
got = outputs_and_grads(compiled, states, weights, structure)
want = outputs_and_grads(side_network_reference, states, weights, structure)
assert all((a - b).abs().max() <= 1e-11 * b.abs().max() for a, b in zip(got, want, strict=True))
print(torch.ops.crossan_fast_cpp.build_info())
"""
    ran = in_process(script, CROSSAN_FAST_CPU_L2=kilobytes)
    assert ran.returncode == 0, ran.stderr
    assert f"blocks fit to {kilobytes} kB of L2 (CROSSAN_FAST_CPU_L2)" in ran.stdout


def test_a_size_of_l2_that_is_none_is_named():
    ran = in_process(
        "import torch; from crossan_fast import _build; _build.load('cpu')\n"
        "torch.ops.crossan_fast_cpp.build_info()",
        CROSSAN_FAST_CPU_L2="1M",
    )
    assert "CROSSAN_FAST_CPU_L2: expected a core's L2 in kB, got '1M'" in ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the ops run on one thread")
def test_threads_are_torchs_own():
    """One thread more for the op, whoever compiled it, and none for torch's own work after that."""
    script = """
import os, torch
from crossan_fast import _build
from crossan_fast.ops import SideNetworkStructure
from side_networks import SINGLES, compiled, make_states, make_weights
_build.load("cpu")
torch.set_num_threads(2)
structure = SideNetworkStructure((32,), SINGLES[:1], "none")
weights, states = make_weights(structure, 2, 4), make_states(structure, 300, 2)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
compiled(states, weights, structure)
during = count()
torch.ones(1 << 22).exp_()
print(during - before, count() - during)
"""
    ran = in_process(script)
    assert ran.stdout.split() == ["1", "0"], ran.stderr


def in_process(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    helpers = Path(__file__).parents[2] / "helpers"
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
