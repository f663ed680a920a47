"""side_network in Triton against the float64 reference: judged by eager torch's error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from judging import judge_all
from torch import Tensor

from crossan_fast.cache.quantize import quantize
from crossan_fast.kernels import _streaming_loss, fusion
from crossan_fast.kernels import side_network as kernel
from crossan_fast.kernels.side_network import forward_launch, host, plan
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    SideNetworkWeights,
    side_network,
    side_network_reference,
)

TRIPLE = ((0,), (1,), (2,))
PAIR = ((0,), (1,))


@dataclass
class Case:
    """A random network and its items; sizes are odd and all different, so that a swapped pair shows."""

    structure: SideNetworkStructure
    levels: int = 2
    rank: int = 16
    embedding: int = 12
    items: int = 19
    rows: int = 9
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None
    ids_dtype: torch.dtype | None = torch.int64
    absent: float = 0.3
    gates: tuple[float, ...] = ()  # θ of each level, every tower's; else drawn near 0
    seed: int = 0

    def build(self, device: torch.device):
        s, r, levels = self.structure, self.rank, self.levels
        g = torch.Generator().manual_seed(self.seed)
        dtype = self.weights_dtype or self.dtype

        def normal(*shape: int, scale: float = 0.2) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        wide = [(min(w), max(w)) for w in ([s.widths[m] for m in s.sources[t]] for t in s.narrowed_towers)]
        weights = SideNetworkWeights(
            down_weight=[normal(levels, r, d) for d in s.tower_widths],
            down_bias=[normal(levels, r) for _ in s.sources],
            up_weight=[normal(levels, d, r) for d in s.tower_widths],
            up_bias=[normal(levels, d) for d in s.tower_widths],
            gate=[
                torch.tensor(self.gates, device=device, dtype=dtype)
                if self.gates
                else normal(levels, scale=0.1)
                for _ in s.sources
            ],
            head_weight=[normal(self.embedding, d) for d in s.tower_widths],
            head_bias=[normal(self.embedding) for _ in s.sources],
            cross_gate=[normal(levels, scale=0.5) for _ in s.cross_pairs],
            cross_down=[normal(r, s.widths[n]) for _, n in s.projected_pairs],
            cross_up=[normal(s.widths[m], r) for m, _ in s.projected_pairs],
            pair_weight=[normal(levels, a, b) for a, b in wide],
            pair_bias=[normal(levels, a) for a, _ in wide],
        )
        rows = self.rows if self.ids_dtype else self.items
        states = [torch.randn(rows, levels, d, generator=g) for d in s.widths]
        scales = None
        if self.stored in (torch.int8, torch.float8_e4m3fn):
            codes = [quantize(x, self.stored) for x in states]
            states, scales = [c for c, _ in codes], [x.to(device) for _, x in codes]
        states = [x.to(device, self.stored or self.dtype) for x in states]
        ids = None
        if self.ids_dtype:
            ids = torch.randint(0, rows, (self.items,), generator=g).to(device, self.ids_dtype)
        present = None
        if self.absent:
            present = (torch.rand(self.items, len(s.widths), generator=g) > self.absent).to(device)
        grad = torch.randn(self.items, len(s.sources), self.embedding, generator=g).to(device, self.dtype)
        return weights, states, scales, ids, present, grad


def reference(case: Case, built, dtype: torch.dtype):
    """e and gradients of the plain definition, computed in `dtype` from the very same inputs."""
    weights, states, scales, ids, present, grad = built
    flat = [w.detach().to(dtype).requires_grad_() for w in weights.flatten()]
    e = side_network_reference(
        [s.to(dtype) for s in states],
        case.structure.unflatten(flat),
        case.structure,
        ids=None if ids is None else ids.long(),
        scales=scales,
        present=present,
        dtype=dtype,
    )
    found = torch.autograd.grad(e, flat, grad.to(dtype), allow_unused=True)
    return e.detach(), [torch.zeros_like(w) if f is None else f for w, f in zip(flat, found, strict=True)]


def run(case: Case, built):
    """e, z and the weights' gradients by the kernels."""
    weights, states, scales, ids, present, grad = built
    call = (states, scales or [], ids, present, weights.flatten(), *case.structure.static, case.dtype)
    e, saved, links = kernel.forward(*call)
    return e, saved, kernel.backward(grad, saved, links, *call)


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    norm = exact.norm().item()
    return ((got.double() - exact).norm().item() / norm) if norm else got.double().norm().item()


def check(case: Case, device: torch.device) -> None:
    built = case.build(device)
    e, saved, gradients = run(case, built)
    assert e.dtype == saved.dtype == case.dtype
    for got, weight in zip(gradients, built[0].flatten(), strict=True):
        assert got.dtype == weight.dtype and got.shape == weight.shape

    def fields(e, gradients):
        # A field at a time: of a gate's two or three numbers alone, chance decides whose rounding is luckier.
        groups = [[e], *case.structure.unflatten(gradients)]
        return [torch.cat([t.flatten() for t in group]) for group in groups if group]

    truth = fields(*reference(case, built, torch.float64))
    judge_all(
        range(len(truth)),
        fields(e, gradients),
        lambda: fields(*reference(case, built, case.dtype)),
        truth,
    )


BACKBONE = SideNetworkStructure((40, 40, 40), TRIPLE, "backbone", "gelu")
UNEQUAL = SideNetworkStructure((40, 24), PAIR, "backbone", "gelu")


@pytest.mark.sweep(4)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(BACKBONE, levels=3), id="backbone"),
        pytest.param(Case(replace(BACKBONE, cross="none", activation="relu"), rank=20), id="none-relu-r20"),
        pytest.param(Case(SideNetworkStructure((40, 40), PAIR, "side", "gelu"), items=17), id="side"),
        pytest.param(Case(UNEQUAL), id="unequal-widths"),
        pytest.param(Case(SideNetworkStructure((40, 24), PAIR, "side", "relu"), items=11), id="side-unequal"),
        pytest.param(Case(replace(BACKBONE, cross_projection="low_rank"), items=17), id="low-rank"),
        pytest.param(
            Case(SideNetworkStructure((40, 24, 40), TRIPLE, "side", cross_projection="low_rank"), items=11),
            id="side-low-rank",
        ),
        pytest.param(
            Case(SideNetworkStructure((40, 24), ((0,), (1,), (0, 1)), "side", "gelu"), items=11),
            id="side-pairs",
        ),
        pytest.param(
            Case(SideNetworkStructure((40, 24, 24), (*TRIPLE, (0, 1)), "backbone", "gelu"), items=11),
            id="backbone-pairs",
        ),
        pytest.param(
            Case(SideNetworkStructure((24, 24), ((0,), (1,), (0, 1)), "none", "relu"), items=17),
            id="iisan",
        ),
        pytest.param(
            Case(SideNetworkStructure((24, 40), ((0,), (1,), (0, 1)), "none", "relu"), items=17),
            id="iisan-unequal",
        ),
        pytest.param(Case(replace(BACKBONE, widths=(33, 33, 33)), absent=0.0), id="odd-width"),
        pytest.param(
            Case(SideNetworkStructure((40,), ((0,),), "none", "gelu"), levels=1, items=5), id="single-level"
        ),
        pytest.param(
            Case(SideNetworkStructure((20,), ((0,),), "none", "gelu"), levels=5, rank=40, items=9),
            id="level-groups",
        ),
        pytest.param(
            Case(SideNetworkStructure((40,), ((0,),), "none", "gelu"), levels=3, rank=136, items=9),
            id="rank-in-parts",
            marks=pytest.mark.long,
        ),
        pytest.param(
            Case(replace(BACKBONE, widths=(24, 24, 24)), levels=5, gates=(1.2, -0.9, 0.4, 12.0, -12.0)),
            id="gates-shut-and-open",
        ),
        pytest.param(
            Case(replace(BACKBONE, widths=(24, 24, 24)), levels=3, gates=(-2.0, -2.0, -2.0), embedding=70),
            id="wide-embedding",
        ),
        pytest.param(Case(UNEQUAL, ids_dtype=None), id="dense-rows"),
        pytest.param(Case(replace(UNEQUAL, widths=(24, 24)), ids_dtype=torch.int32), id="int32-ids"),
    ],
)
def test_matches_the_float64_reference(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=["cast", "autocast"])
def test_half_precision_accumulates_in_fp32(dtype, weights_dtype, device: torch.device) -> None:
    case = Case(replace(UNEQUAL, widths=(24, 24)), items=40, dtype=dtype, weights_dtype=weights_dtype)
    check(case, device)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_stored_states_are_converted_inside(stored: torch.dtype, device: torch.device) -> None:
    structure = SideNetworkStructure((24, 24), PAIR, "backbone", "gelu")
    check(Case(structure, stored=stored), device)


def test_every_fp8_code_is_decoded(device: torch.device) -> None:
    """256 codes but NaN's two, through a network that is the identity on them: gate wide open, no adapter."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    width = codes.numel()
    states = codes.view(torch.float8_e4m3fn).view(1, 1, width).to(device)
    structure = SideNetworkStructure((width,), ((0,),), "none", "relu")
    zeros = [torch.zeros(s, device=device) for s in ((1, 16, width), (1, 16), (1, width, 16), (1, width))]
    identity = torch.eye(width, device=device)
    gate = [torch.full((1,), 100.0, device=device)]
    heads = [identity], [identity.new_zeros(width)]
    weights = SideNetworkWeights(*([z] for z in zeros), gate, *heads)
    scales = [torch.full((1, 1), 0.5, device=device)]
    static = (*structure.static, torch.float32)
    out, *_ = kernel.forward([states], scales, None, None, weights.flatten(), *static)
    assert torch.equal(out[0, 0].cpu(), states.cpu().float().flatten() * 0.5)


def test_modalities_may_be_stored_in_different_types(device: torch.device) -> None:
    """Towers that each read their own modality then need launches of their own; cross towers share one."""
    for cross in ("none", "backbone"):
        case = Case(SideNetworkStructure((24, 24), PAIR, cross, "gelu"), items=11)
        weights, states, scales, ids, present, grad = case.build(device)
        states[1] = states[1].half().float().half()
        built = (weights, states, scales, ids, present, grad)
        e, _, gradients = run(case, built)
        exact_e, exact_gradients = reference(case, built, torch.float64)
        pairs = zip([e, *gradients], [exact_e, *exact_gradients], strict=True)
        assert all(error(got, exact) < 1e-6 for got, exact in pairs)


def test_strided_inputs(device: torch.device) -> None:
    case = Case(SideNetworkStructure((24, 24), PAIR, "backbone", "gelu"), stored=torch.int8)
    weights, states, scales, ids, present, grad = case.build(device)
    want = run(case, (weights, states, scales, ids, present, grad))
    wide = [torch.stack([s, s], dim=1)[:, 0] for s in states]  # rows twice as far apart
    turned = [s.transpose(0, 2).contiguous().transpose(0, 2) for s in states]  # D is not the dense one
    odd = SideNetworkWeights(
        *([w.transpose(0, -1).contiguous().transpose(0, -1) for w in g] for g in weights)
    )
    flags = present.T.contiguous().T
    spread = torch.stack([grad, grad], dim=-1)[..., 0]
    apart = [torch.stack([s, s], dim=-1)[..., 0] for s in scales]
    far = torch.stack([ids, ids], dim=1)[:, 0]
    for changed in (wide, turned):
        got = run(case, (odd, changed, apart, far, flags, spread))
        for a, b in zip(_flat(want), _flat(got), strict=True):
            assert torch.equal(a, b)


def _flat(results):
    e, saved, gradients = results
    return [e, saved, *gradients]


def test_absent_towers_are_zero_and_give_no_gradient(device: torch.device) -> None:
    """Also where the cache holds rubbish for an absent modality."""
    case = Case(SideNetworkStructure((24, 24), ((0,), (1,), (0, 1)), "none", "relu"), items=6)
    weights, states, _, _, _, grad = case.build(device)
    ids = torch.arange(6, device=device)
    states[1][:6] = float("nan")
    present = torch.zeros(6, 2, dtype=torch.bool, device=device)
    present[2:4, 0] = True
    e, saved, gradients = run(case, (weights, states, None, ids, present, grad))
    assert not e[:, 1].any() and not saved[1].any()
    assert not e[:2, 0].any() and not e[4:, 2].any() and e[2:4, 2].all(1).any()
    towers = len(case.structure.sources)
    assert all(g.isfinite().all() for g in gradients)
    assert all(not gradients[field * towers + 1].any() for field in range(7))


def test_no_items(device: torch.device) -> None:
    case = Case(UNEQUAL, items=0, absent=0.0)
    e, saved, gradients = run(case, case.build(device))
    assert e.shape == (0, 2, 12) and saved.shape == (2, 0, 2, 16)
    assert not any(g.any() for g in gradients)


@pytest.mark.long
def test_runs_repeat_bit_for_bit(device: torch.device) -> None:
    case = Case(BACKBONE, items=40, dtype=torch.bfloat16)
    built = case.build(device)
    first, second = run(case, built), run(case, built)
    for a, b in zip(_flat(first), _flat(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("structure", [UNEQUAL, replace(UNEQUAL, widths=(24, 24))], ids=["dense", "direct"])
def test_chunks_of_items_add_up(structure, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHUNK", 8)
    monkeypatch.setattr(host, "DENSE_CHUNK", 8)
    check(Case(structure, items=19), device)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("fused", [True, False])
def test_one_launch_and_two_agree_with_the_reference(fused, device, monkeypatch) -> None:
    """Which of the two serves is a matter of size; here both do, the split one along D as well."""
    choose = plan.forward_config

    def forced(problem):
        splits = 1 if fused else 3
        return replace(
            choose(problem), fused=fused, levels=problem.levels, splits=splits, columns=16, span=16
        )

    monkeypatch.setattr(plan, "forward_config", forced)
    monkeypatch.setattr(forward_launch, "forward_candidates", lambda problem: [forced(problem)])
    check(Case(BACKBONE, items=18), device)


def test_scratch_of_a_split_batch_is_read_only_where_written(device: torch.device, monkeypatch) -> None:
    """A range of items without an item still owns a share of every weight: zeros, not what was there."""
    choose = plan.gradient_config
    monkeypatch.setattr(plan, "gradient_config", lambda p: replace(choose(p), splits=4, mixing_splits=3))
    check(Case(BACKBONE, items=20), device)


def test_what_is_refused(device: torch.device) -> None:
    from crossan_fast.ops._dispatch import Request, refusal

    wanted = Request("side_network", device.type, torch.float32, ("states_grad",))
    assert "frozen" in (refusal(wanted, "triton") or "")
    assert refusal(replace(wanted, features=()), "triton") is None
    assert "float64" in (refusal(replace(wanted, features=(), dtype=torch.float64), "triton") or "")
    assert refusal(replace(wanted, features=("embedding=256",)), "triton") is None
    assert "embedding=257" in (refusal(replace(wanted, features=("embedding=257",)), "triton") or "")


def test_through_the_registered_op(device: torch.device) -> None:
    """The op's glue hands the kernels what they expect: outputs and gradients of a call under autograd."""
    case = Case(SideNetworkStructure((24, 24), PAIR, "backbone", "gelu"), items=7)
    weights, states, _, ids, present, grad = case.build(device)
    flat = [w.requires_grad_() for w in weights.flatten()]
    e = side_network(
        states, case.structure.unflatten(flat), case.structure, ids=ids, present=present, backend="triton"
    )
    found = torch.autograd.grad(e, flat, grad)
    exact_e, exact = reference(case, (weights, states, None, ids, present, grad), torch.float64)
    pairs = zip([e, *found], [exact_e, *exact], strict=True)
    assert all(error(got.detach(), want) < 1e-6 for got, want in pairs)


def test_registered_op_passes_opcheck(device: torch.device) -> None:
    structure = SideNetworkStructure((24, 24), PAIR, "backbone", "gelu")
    weights, states, scales, ids, present, _ = Case(structure, items=5, stored=torch.int8).build(device)
    flat = [w.requires_grad_() for w in weights.flatten()]
    static = (*structure.static, torch.float32, "triton")
    torch.library.opcheck(
        torch.ops.crossan_fast.side_network.default, (states, scales, ids, present, flat, *static)
    )


@pytest.mark.long
def test_compiles_whole_with_dynamic_sizes_under_autocast(device: torch.device) -> None:
    """Half precision from fp32 weights, only some of which need a gradient, and a tower nobody uses."""
    structure = SideNetworkStructure((24, 24), PAIR, "none", "gelu")
    weights, states, _, ids, _, _ = Case(structure, absent=0.0).build(device)
    weights.up_weight[0].requires_grad_()
    weights.gate[0].requires_grad_()

    def run(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = side_network(states, weights, structure, ids=ids, backend="triton")[:, 0]
        assert out.dtype == torch.bfloat16
        return out.float().square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    wanted = [weights.up_weight[0], weights.gate[0]]
    for some in (ids, ids[:7], ids.repeat(2)):
        want, got = (torch.autograd.grad(function(some), wanted) for function in (run, compiled))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


KEPT = {
    "cast": Case(SideNetworkStructure((24, 40), PAIR), dtype=torch.bfloat16, weights_dtype=torch.float32),
    "as-they-are": Case(SideNetworkStructure((24, 24), PAIR), levels=3, rank=20, embedding=17),
    "pairs": Case(
        SideNetworkStructure((24, 40), (*PAIR, (0, 1)), "none"),
        dtype=torch.float16,
        weights_dtype=torch.float32,
    ),
    "one-level": Case(SideNetworkStructure((24,), ((0,),)), levels=1, rank=3, dtype=torch.bfloat16),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", KEPT)
def test_a_backward_reads_what_the_forward_made_of_the_weights_or_makes_it_itself(name, device):
    """The same bits either way: where another backend's forward kept nothing, there is nothing to read."""
    case = KEPT[name]
    weights, states, scales, ids, present, grad = case.build(device)
    call = (states, scales or [], ids, present, weights.flatten(), *case.structure.static, case.dtype)
    _, saved, links = kernel.forward(*call)
    read = kernel.backward(grad, saved, links, *call)
    made = kernel.backward(grad, saved, links[:, :0], *call)
    assert links.numel() > 0 and all(torch.equal(x, y) for x, y in zip(read, made, strict=True))
    broken = kernel.backward(grad, saved, torch.full_like(links, float("nan")), *call)
    assert not all(x.isfinite().all() for x in broken)


def test_nothing_is_kept_where_levels_read_each_others_h(device):
    case = Case(SideNetworkStructure((24, 24), PAIR, "side"))
    weights, states, scales, ids, present, _ = case.build(device)
    call = (states, scales or [], ids, present, weights.flatten(), *case.structure.static, case.dtype)
    assert kernel.forward(*call)[2].shape == (2, 0)


@pytest.mark.parametrize("device", ["sm_120", "sm_121"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_after_hopper_without_its_instructions_gets_the_tiles_of_those_before(device, dtype):
    """Hopper's spill there (448 bytes in *combine*), and take all but 3 kB of its shared memory."""

    def configs(device):
        problem = plan.Problem(device, 170, 32_768, 4, 7, 4, 768, 64, 64, dtype, (2,))
        fusion_and_loss = (
            fusion.host.config(device, dtype, False, 64, 20_314),
            *(_streaming_loss.config(device, dtype, False, 64, backward) for backward in (False, True)),
        )
        return plan.forward_config(problem), plan.gradient_config(problem), fusion_and_loss

    assert configs(device) == configs("sm_89")
