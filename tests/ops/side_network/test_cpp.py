"""The compiled side_network against its definition; its stored types, threads, forks and refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from compiled_ops import assert_same_bits_on_any_threads, needs_cpp
from side_networks import (
    STRUCTURES,
    assert_no_worse_than_eager,
    compiled,
    in_dtype,
    make_states,
    make_weights,
    outputs_and_grads,
)
from torch import Tensor

from crossan_fast import _build
from crossan_fast.ops import _dispatch
from crossan_fast.ops.side_network import SideNetworkStructure, side_network, side_network_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


# Towers of width 20 walk by links at a rank of 6, with h itself at one of 40.
RANKS = (6, 40)


@pytest.mark.parametrize("subset", [False, True], ids=["all rows", "ids and present"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_float64_equals_the_definition(name, rank, levels, subset):
    structure, rows = STRUCTURES[name], 131
    weights, states = make_weights(structure, levels, rank), make_states(structure, rows, levels)
    arguments = {}
    if subset:
        generator = torch.Generator().manual_seed(3)
        arguments["ids"] = torch.randint(0, rows, (77,), generator=generator)
        arguments["present"] = torch.rand(77, len(structure.widths), generator=generator) > 0.4
    got = outputs_and_grads(compiled, states, weights, structure, **arguments)
    expected = outputs_and_grads(side_network_reference, states, weights, structure, **arguments)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("width", "walk"), [(20, "with h"), (36, "with h"), (37, "by links"), (38, "by links"), (60, "by links")]
)
def test_narrow_towers_walk_with_h(width, walk):
    """Links save 4 L·D·r products an item and cost 3 for each of their numbers: here they pay from 37 on."""
    structure = SideNetworkStructure((width, width), ((0,), (1,)))
    weights, states = make_weights(structure, 4, 18, 22), make_states(structure, 70, 4)
    links = 4 * 3 // 2 * 18 * 18 + 4 * 18 * 22
    assert (4 * 4 * 18 * width < 3 * links) == (walk == "with h")
    _, _, kept = torch.ops.crossan_fast.side_network(
        states, [], None, None, weights.flatten(), *structure.static, torch.float64, "cpp"
    )
    assert kept.shape == (2, 0 if walk == "with h" else links)
    got = outputs_and_grads(compiled, states, weights, structure)
    expected = outputs_and_grads(side_network_reference, states, weights, structure)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [17, *(pytest.param(rank, marks=pytest.mark.long) for rank in (8, 40))])
@pytest.mark.parametrize("name", ["backbone", "unequal widths, side", "low rank", "low rank, side", "pairs"])
def test_error_is_no_worse_than_eagers(name, rank, dtype):
    structure, levels = STRUCTURES[name], 4
    weights = in_dtype(make_weights(structure, levels, rank), dtype)
    states = [s.to(dtype) for s in make_states(structure, 300, levels)]
    assert_no_worse_than_eager(states, weights, structure, draws=4)


def need_brgemm():
    _build.load("cpu")
    if not torch.ops.crossan_fast_cpp.has_brgemm():
        pytest.skip("torch has no bf16 brgemm on this CPU: oneDNN may use no bf16 of AVX-512 or AMX")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])  # the second takes bf16, and finds no code for it
def test_a_way_of_bf16_that_cannot_be_is_refused(isa):
    """In a process whose oneDNN may use no bf16 of the CPU, where `auto` has to serve."""
    script = """
import os, torch
from crossan_fast import _build
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights, side_network
_build.load("cpu")
s = SideNetworkStructure((32,), ((0,),), "none")
shapes = (2, 4, 32), (2, 4), (2, 32, 4), (2, 32), (2,), (8, 32), (8,)
w = SideNetworkWeights(*([torch.randn(*shape).bfloat16()] for shape in shapes))
x = [torch.randn(5, 2, 32).bfloat16()]
for wish in ("auto", "brgemm", "bf16"):
    os.environ["CROSSAN_FAST_CPU_BF16"] = wish
    try:
        out = side_network(x, w, s, backend="cpp")
        print("finite" if out.isfinite().all() else out)
    except (ValueError, RuntimeError) as error:
        print(str(error).splitlines()[0])
    print(torch.ops.crossan_fast_cpp.build_info().partition("side_network in ")[2])
print(torch.ops.crossan_fast_cpp.has_brgemm())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=240,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["finite", "fp32 (torch has no bf16 brgemm on this CPU)"]
    assert lines[2].startswith("CROSSAN_FAST_CPU_BF16: 'brgemm' was asked for, but torch has it only where")
    assert lines[4] == "CROSSAN_FAST_CPU_BF16: expected 'auto', 'brgemm' or 'fp32', got 'bf16'"
    assert lines[3] == f"nothing ({lines[2]})" and lines[5] == f"nothing ({lines[4]})"
    assert lines[6] == "False"


@pytest.mark.parametrize("rank", [7, 12, 17, 24])  # of an odd one products of weights alone stay in fp32
@pytest.mark.parametrize(
    "name", ["backbone", "unequal widths, side", "low rank", "low rank, side", "pairs", "none, relu"]
)
def test_brgemm_is_no_worse_than_eager(name, rank, monkeypatch):
    """The path of CPUs with bf16 products, forced: oneDNN runs the same ones with AVX-512."""
    need_brgemm()
    monkeypatch.setenv("CROSSAN_FAST_CPU_BF16", "brgemm")
    assert "in brgemm (CROSSAN_FAST_CPU_BF16=brgemm)" in torch.ops.crossan_fast_cpp.build_info()
    structure, levels = STRUCTURES[name], 4
    weights = in_dtype(make_weights(structure, levels, rank), torch.bfloat16)
    states = [s.bfloat16() for s in make_states(structure, 301, levels)]
    assert_no_worse_than_eager(states, weights, structure, draws=4)


def test_brgemm_rounds_where_fp32_does_not_and_nowhere_else(monkeypatch):
    """Small integers are exact in bf16: there both paths agree bit for bit; other values tell them apart."""
    need_brgemm()
    structure, levels, rows = SideNetworkStructure((70, 70), ((0,), (1,)), "none", "relu"), 1, 131
    generator = torch.Generator().manual_seed(5)
    flat = make_weights(structure, levels, 17).flatten()
    whole = structure.unflatten([torch.randint(-1, 2, w.shape, generator=generator) for w in flat])
    open_gates = [torch.full((levels,), 100.0) for _ in structure.sources]  # μ = 1: x is the state
    whole = in_dtype(whole._replace(gate=open_gates), torch.bfloat16)
    states = [torch.randint(-1, 2, (rows, levels, 70), generator=generator).bfloat16() for _ in range(2)]
    broken = in_dtype(make_weights(structure, levels, 17), torch.bfloat16)
    results = {}
    for way in ("fp32", "brgemm"):
        monkeypatch.setenv("CROSSAN_FAST_CPU_BF16", way)
        exact = compiled(states, whole, structure)
        # The gradients' operands have to be exact too: ones.
        grads = torch.autograd.grad(exact, whole.up_weight, torch.ones_like(exact))
        results[way] = [exact, *grads], outputs_and_grads(compiled, states, broken, structure)
    for x, y in zip(results["fp32"][0], results["brgemm"][0], strict=True):
        assert torch.equal(x, y)
    assert not all(torch.equal(x, y) for x, y in zip(results["fp32"][1], results["brgemm"][1], strict=True))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_the_papers_size(dtype):
    """In bf16 by the way that this CPU takes."""
    structure = SideNetworkStructure((768,) * 2, ((0,), (1,)))
    weights = in_dtype(make_weights(structure, 7, 64, 64), dtype)
    states = [s.to(dtype) for s in make_states(structure, 200, 7)]
    assert_no_worse_than_eager(states, weights, structure, draws=2)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations_over_their_whole_range(activation):
    structure = SideNetworkStructure((16,), ((0,),), "none", activation)
    weights = make_weights(structure, 1, 16, 16)
    one = torch.eye(16, dtype=torch.float64)[None]
    weights = weights._replace(
        down_weight=[one.clone().requires_grad_()],
        up_weight=[one.clone().requires_grad_()],
        gate=[torch.full((1,), 10.0, dtype=torch.float64).requires_grad_()],  # μ = 1: x is the state
        head_weight=[one[0].clone().requires_grad_()],  # and e its h
    )
    state = torch.linspace(-30, 30, 40000, dtype=torch.float64)[: 2500 * 16].reshape(-1, 1, 16)
    state[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=torch.float64)
    assert_no_worse_than_eager([state.float()], in_dtype(weights, torch.float32), structure)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradcheck_on_the_compiled_code(name):
    structure = STRUCTURES[name]
    weights, states = make_weights(structure, 2, 3), make_states(structure, 5, 2)
    present = torch.ones(5, len(structure.widths), dtype=torch.bool)
    present[1, 0] = False
    present[2] = False

    def run(*flat: Tensor) -> Tensor:
        return compiled(states, structure.unflatten(flat), structure, present=present)

    assert torch.autograd.gradcheck(run, tuple(weights.flatten()), fast_mode=True)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    "stored", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8]
)
def test_reads_every_stored_type(stored, ids_dtype):
    structure, levels, rows = STRUCTURES["unequal widths"], 2, 9
    weights = in_dtype(make_weights(structure, levels, 4), torch.float32)
    generator = torch.Generator().manual_seed(4)
    states, scales = make_states(structure, rows, levels), None
    if stored in (torch.int8, torch.float8_e4m3fn):
        scales = [torch.rand(rows, levels, generator=generator) + 0.5 for _ in states]
    states = [(s * 30).round().to(stored) if stored == torch.int8 else s.to(stored) for s in states]
    ids = torch.tensor([3, 0, 8, 3, 5], dtype=ids_dtype)
    arguments = {"ids": ids, "scales": scales}
    got = outputs_and_grads(compiled, states, weights, structure, **arguments)
    exact = in_dtype(weights, torch.float64)
    truth = outputs_and_grads(side_network_reference, states, exact, structure, **arguments)
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5 * float(y.abs().max() + 1))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_converts_every_bit_pattern(stored):
    """Level 0 with μ = 1, no bottleneck and an identity for a head: the outputs are the converted states."""
    bits = torch.arange(256 if stored == torch.float8_e4m3fn else 65536)
    states = bits.to(torch.uint8 if stored == torch.float8_e4m3fn else torch.uint16).view(stored)
    states = torch.where(states.float().isfinite(), states.float(), 0).to(stored).reshape(-1, 1, 16)
    structure = SideNetworkStructure((16,), ((0,),), "none")
    weights = in_dtype(make_weights(structure, 1, 1, 16), torch.float32)
    with torch.no_grad():
        for tensor in weights.flatten():
            tensor.zero_()
        weights.gate[0].fill_(1e3)
        weights.head_weight[0].copy_(torch.eye(16))
    scales = [torch.ones(states.shape[0], 1)]
    got = compiled([states], weights, structure, scales=scales)
    assert torch.equal(got[:, 0].detach(), states[:, 0].float())


def test_strided_states_and_mixed_weight_dtypes():
    structure, levels = STRUCTURES["backbone"], 3
    weights = in_dtype(make_weights(structure, levels, 5), torch.float32)
    states = [torch.randn(levels, 14, 40).transpose(0, 1)[::2, :, 1::2][:, :, :20] for _ in range(3)]
    assert not any(s.is_contiguous() for s in states)
    got = outputs_and_grads(compiled, states, weights, structure)
    expected = outputs_and_grads(side_network_reference, states, weights, structure)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = side_network(states, weights, structure, backend="cpp")
        grads = torch.autograd.grad(outputs.float().sum(), weights.flatten())
    assert outputs.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("ids", [None, torch.empty(0, dtype=torch.int64)], ids=["no rows", "no ids"])
def test_empty_batch(ids):
    structure = STRUCTURES["pairs and crosses"]
    weights = make_weights(structure, 2, 3)
    states = make_states(structure, 0 if ids is None else 4, 2)
    got = outputs_and_grads(compiled, states, weights, structure, ids=ids)
    assert got[0].shape == (0, 6, 10)
    assert all(not g.any() for g in got[1:])


@pytest.mark.parametrize("name", STRUCTURES)
def test_bits_do_not_depend_on_threads(name):
    structure = STRUCTURES[name]
    weights = in_dtype(make_weights(structure, 3, 19), torch.float32)
    states = [s.float() for s in make_states(structure, 700, 3)]  # several blocks of items
    assert_same_bits_on_any_threads(lambda: outputs_and_grads(compiled, states, weights, structure))


def test_works_in_a_forked_child_of_a_threaded_process():
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    script = """
import os, torch
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights, side_network
torch.set_num_threads(2)
s = SideNetworkStructure((32,), ((0,),), "none")
w = SideNetworkWeights([torch.randn(2, 4, 32)], [torch.zeros(2, 4)], [torch.randn(2, 32, 4)],
                       [torch.zeros(2, 32)], [torch.zeros(2)], [torch.randn(8, 32)], [torch.zeros(8)])
x = [torch.randn(500, 2, 32)]
expected = side_network(x, w, s, backend="cpp")
pid = os.fork()
got = side_network(x, w, s, backend="cpp")
same = torch.equal(got, expected)
if pid == 0:
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and same
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)


def test_states_that_want_gradients_are_refused_with_the_reason():
    structure = STRUCTURES["backbone"]
    weights = make_weights(structure, 2, 3)
    states = [s.requires_grad_() for s in make_states(structure, 4, 2)]
    with pytest.raises(_dispatch.BackendUnavailable, match="states get no gradient"):
        compiled(states, weights, structure)


def _arguments(**changed):
    structure = STRUCTURES["unequal widths"]
    weights = [w.detach() for w in make_weights(structure, 2, 3).flatten()]
    arguments = {
        "states": make_states(structure, 4, 2),
        "scales": [],
        "ids": None,
        "present": None,
        "weights": weights,
        "widths": [20, 33, 20],
        "sources": [0, -1, 1, -1, 2, -1],
        "cross": "backbone",
        "activation": "gelu",
        "temperature": 0.1,
        "cross_projection": "identity",
        "dtype": torch.float64,
    }
    arguments.update({k: v(arguments[k]) if callable(v) else v for k, v in changed.items()})
    return arguments.values()


def _call(**changed):
    _build.load("cpu")
    return torch.ops.crossan_fast_cpp.side_network(*_arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": torch.tensor([0, 4])}, r"ids: expected ids in \[0, 4\), got 4 at place 1"),
        ({"ids": torch.tensor([-1])}, "got -1 at place 0"),
        ({"ids": torch.tensor([[1]])}, "ids: expected one dimension"),
        ({"ids": torch.tensor([1], dtype=torch.int16)}, "ids: expected dtype"),
        ({"present": torch.ones(3, 3, dtype=torch.bool)}, r"present: expected shape \[4, 3\]"),
        ({"present": torch.ones(4, 3)}, "present: expected dtype"),
        ({"states": lambda s: s[:2]}, "states: expected 3 tensors, got 2"),
        ({"states": lambda s: [s[0], s[1][:3], s[2]]}, r"states\[1\]: expected shape"),
        ({"states": lambda s: [s[0], s[1], s[2].int()]}, r"states\[2\]: expected dtype"),
        ({"scales": [torch.ones(4, 2)]}, "scales: expected 3 tensors"),
        ({"scales": [torch.ones(4, 1)] * 3}, r"scales\[0\]: expected shape"),
        ({"weights": lambda w: w[:-1]}, "weights"),
        ({"weights": lambda w: [*w, w[0]]}, "weights: expected"),
        ({"weights": lambda w: [w[0], w[1][:, :2], *w[2:]]}, r"weights\[1\]: expected shape"),
        ({"weights": lambda w: [*w[:16], w[16][:9], *w[17:]]}, r"weights\[16\]: expected shape"),
        ({"weights": lambda w: [*w[:18], w[18][:9], *w[19:]]}, r"weights\[18\]: expected shape"),
        ({"weights": lambda w: [*w[:15], w[15][0], *w[16:]]}, r"weights\[15\]: expected \[d, D\]"),
        ({"weights": lambda w: [w[0].to("meta"), *w[1:]]}, "Meta"),
        ({"widths": [20, 33, 21]}, "expected shape"),
        ({"widths": []}, "widths"),
        ({"sources": [0, -1, 1, -1]}, "sources"),
        ({"sources": [0, -1, 1, -1, 2, 7]}, "sources: tower 2"),
        ({"sources": [0, -1, 1, -1, 2, -1, 5, 0]}, "sources: tower 3"),
        ({"cross": "sideways"}, "cross: expected none, backbone or side, got 'sideways'"),
        ({"activation": "silu"}, "activation: expected gelu or relu, got 'silu'"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"cross_projection": "full"}, "cross_projection: expected identity or low_rank, got 'full'"),
        ({"cross_projection": "low_rank"}, "weights"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(changed, message):
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, NotImplementedError), match=message):
        _call(**changed)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda e: e[:, :2], r"grad_embeddings: expected shape \[4, 3, 10\]"),
        (0, lambda e: e.float(), "grad_embeddings: expected dtype"),
        (1, lambda z: z[:, :, :1], r"saved: expected shape \[3, 4, 2, 3\]"),
        (1, lambda z: z.float(), "saved: expected dtype"),
        (2, lambda p: p[:, 1:], r"links: expected shape \[3, 69\]"),
        (2, lambda p: p.float(), "links: expected dtype"),
    ],
)
def test_what_the_backward_is_handed_is_checked(place, change, message):
    kept, arguments = _call(), _arguments()
    kept[place] = change(kept[place])
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.crossan_fast_cpp.side_network_backward(*kept, *arguments)
