"""The same kernels built by nvcc, on a GPU: what the emulator can't show."""

import subprocess
import sys

import pytest
import torch

from crossan_fast import _build
from crossan_fast.cache.quantize import quantize
from crossan_fast.ops import _cuda
from crossan_fast.ops.deduplicate import deduplicate_reference
from crossan_fast.ops.fusion import FusionWeights, _softmax, _top, fusion_reference
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    SideNetworkWeights,
    side_network_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MMA, HOPPER = 1, 2


@pytest.fixture(scope="module")
def gpu():
    if problem := _build.problem("cuda"):
        pytest.fail(f"a GPU is here, but the CUDA part cannot be built: {problem}")
    return torch.device("cuda")


@pytest.fixture(params=[MMA, HOPPER], ids=["mma", "hopper"])
def path(request, gpu, monkeypatch):
    if request.param == HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs a GPU of compute capability 9.0")
    monkeypatch.setattr(_cuda, "_AUTO_PATH", request.param)
    return request.param


def _case(gpu, count, width, levels, modalities, dtype, absent):
    generator = torch.Generator(gpu).manual_seed(count)
    structure = SideNetworkStructure((width,) * modalities, tuple((m,) for m in range(modalities)))

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=gpu) * scale).to(dtype).float()

    per_tower = [
        ((levels, 64, width), width**-0.5),
        ((levels, 64), 0.2),
        ((levels, width, 64), 0.125),
        ((levels, width), 0.2),
        ((levels,), 0.05),
    ]
    weights = SideNetworkWeights(
        *([draw(*shape, scale=scale) for _ in range(modalities)] for shape, scale in per_tower),
        [draw(levels, scale=0.5) for _ in structure.cross_pairs],
    )
    states = [draw(count + 9, levels, width).to(dtype) for _ in range(modalities)]
    ids = torch.randint(0, count + 9, (count,), generator=generator, device=gpu)
    present = torch.rand(count, modalities, generator=generator, device=gpu) < 0.7 if absent else None
    grads = [draw(count, width).to(dtype) for _ in range(modalities)]
    return structure, weights, states, ids, present, grads


def _reference(structure, weights, states, ids, present, grads, dtype):
    flat = [w.to(dtype).requires_grad_() for w in weights.flatten()]
    outputs = side_network_reference(
        states, structure.unflatten(flat), structure, ids=ids, present=present, dtype=dtype
    )
    torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
    return [o.detach() for o in outputs], [w.grad for w in flat]


def _run(structure, weights, states, ids, present, grads, dtype):
    outputs, saved = _cuda._side_network(states, None, ids, present, weights, structure, dtype)
    gradients = _cuda._side_network_backward(
        grads, saved, states, None, ids, present, weights, structure, dtype
    )
    return outputs, gradients


def _error(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def _check(structure, dtype, outputs, gradients):
    """Triples (got, eager in the same type, exact): errors are judged by eager's own."""
    floor = 2 * torch.finfo(dtype).eps
    for got, eager, exact in zip(*outputs, strict=True):
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor / 8
    # A gate's gradient is one sum whose terms cancel: judged by all gates of a kind.
    joined = [
        [torch.cat([t.double().flatten() for t in group]) for group in structure.unflatten(flat) if group]
        for flat in gradients
    ]
    for got, eager, exact in zip(*joined, strict=True):
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "count, width, levels, modalities",
    [(1, 64, 1, 1), (33, 128, 3, 2), (704, 768, 7, 4), (5000, 768, 7, 4), (640, 1024, 8, 3)],
)
@pytest.mark.parametrize("absent", [False, True])
def test_side_network(gpu, path, dtype, count, width, levels, modalities, absent):
    case = _case(gpu, count, width, levels, modalities, dtype, absent)
    structure, *_ = case
    exact_outputs, exact_grads = _reference(*case, torch.float64)
    eager_outputs, eager_grads = _reference(*case, dtype)
    outputs, grads = _run(*case, dtype)
    _check(structure, dtype, (outputs, eager_outputs, exact_outputs), (grads, eager_grads, exact_grads))


def test_repeats_bit_for_bit(gpu, path):
    case = _case(gpu, 2000, 768, 7, 4, torch.bfloat16, True)
    first = _run(*case, torch.bfloat16)
    for _ in range(20):
        poison = torch.full((64 << 20,), float("nan"), device=gpu)  # what the next call's memory held
        del poison
        again = _run(*case, torch.bfloat16)
        for a, b in zip((t for g in first for t in g), (t for g in again for t in g), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("count", [0, 704, 2049, 100_000])
def test_deduplicate(gpu, count):
    item_ids = torch.randint(0, 20_314, (count,), device=gpu)
    got = _cuda._deduplicate(item_ids, count + 1)
    for tensor, want in zip(got, deduplicate_reference(item_ids.cpu(), count + 1), strict=True):
        assert torch.equal(tensor.cpu(), want)


def test_nothing_waits_for_the_device(gpu, path):
    """A CUDA graph captures deduplicate, forward and backward, and replays them on new ids."""
    structure, weights, states, _, _, grads = _case(gpu, 65, 128, 3, 2, torch.bfloat16, False)
    item_ids = torch.randint(0, 60, (8, 11), device=gpu)

    def step():
        ids, *_ = _cuda._deduplicate(item_ids, 65)
        return _run(structure, weights, states, ids, None, grads, torch.bfloat16)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    item_ids.copy_(torch.randint(0, 60, (8, 11), device=gpu))
    graph.replay()
    for a, b in zip((t for g in captured for t in g), (t for g in step() for t in g), strict=True):
        assert torch.equal(a, b)


def test_backward_in_parts(gpu, path, monkeypatch):
    """Parts of the items give the gradients of the whole, up to the order of fp32 sums."""
    case = _case(gpu, 1500, 128, 3, 2, torch.bfloat16, True)
    _, whole = _run(*case, torch.bfloat16)
    monkeypatch.setattr(_cuda, "_BACKWARD_ITEMS", 400)
    _, parts = _run(*case, torch.bfloat16)
    for a, b in zip(whole, parts, strict=True):
        assert _error(a, b) < 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("ids_dtype", [torch.int32, None])
def test_stored_types_and_ids(gpu, path, stored, ids_dtype):
    structure, weights, states, ids, _, grads = _case(gpu, 130, 128, 3, 2, torch.bfloat16, False)
    scales = None
    if stored in (torch.int8, torch.float8_e4m3fn):
        states, scales = map(list, zip(*(quantize(s, stored) for s in states), strict=True))
    else:
        states = [s.to(stored) for s in states]
    if ids_dtype is None:
        ids, states = None, [s[:130] for s in states]
        scales = scales and [s[:130] for s in scales]
    else:
        ids = ids.to(ids_dtype)
    flat = [w.double().requires_grad_() for w in weights.flatten()]
    exact = side_network_reference(
        states, structure.unflatten(flat), structure, ids=ids, scales=scales, dtype=torch.float64
    )
    torch.autograd.backward(exact, [g.double() for g in grads])
    arguments = (states, scales, ids, None, weights, structure, torch.bfloat16)
    outputs, saved = _cuda._side_network(*arguments)
    gradients = _cuda._side_network_backward(grads, saved, *arguments)
    for got, want in zip(outputs, exact, strict=True):
        assert _error(got, want.detach()) < 2e-2
    for got, want in zip(gradients, flat, strict=True):
        assert _error(got, want.grad) < 5e-2


@pytest.mark.parametrize("absent", [False, True])
def test_pair_towers(gpu, path, absent):
    structure, weights, states, ids, present, _ = _case(gpu, 333, 768, 7, 3, torch.bfloat16, absent)
    pairs = ((0, 1), (0, 2), (1, 2))
    structure = SideNetworkStructure(structure.widths, (*structure.sources, *pairs), "none", "relu")
    own = [list(group) * 2 for group in (*weights[:5],)]  # a pair's tower takes a modality's weights
    weights = SideNetworkWeights(*own)
    grads = [torch.randn(333, 768, device=gpu).bfloat16() for _ in structure.sources]
    case = (structure, weights, states, ids, present, grads)
    exact_outputs, exact_grads = _reference(*case, torch.float64)
    eager_outputs, eager_grads = _reference(*case, torch.bfloat16)
    outputs, grads = _run(*case, torch.bfloat16)
    _check(
        structure,
        torch.bfloat16,
        (outputs, eager_outputs, exact_outputs),
        (grads, eager_grads, exact_grads),
    )


def test_rows_beyond_two_to_the_31_elements(gpu, path):
    rows, levels, width = 420_000, 7, 768
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    states = [torch.empty(rows, levels, width, dtype=torch.bfloat16, device=gpu).normal_()]
    ids = torch.tensor([0, rows - 1, rows - 7, 399_458], device=gpu)
    structure, weights, *_ = _case(gpu, 4, width, levels, 1, torch.bfloat16, False)
    got = torch.ops.crossan_fast_cuda.gather_convert(states[0], None, ids, torch.float32)
    assert torch.equal(got, states[0][ids].float())
    (output,), _ = _cuda._side_network(states, None, ids, None, weights, structure, torch.bfloat16)
    near, _ = _cuda._side_network([states[0][ids]], None, None, None, weights, structure, torch.bfloat16)
    assert torch.equal(output, near[0])


@pytest.mark.parametrize("call", ["gather", "side_network", "deduplicate"])
def test_wrong_ids_end_the_launch_with_a_message(gpu, call):
    """In a process of its own: what a device-side failure leaves behind is no CUDA context to go on with."""
    calls = {
        "gather": "ops.gather_convert(torch.zeros(4, 2, 8, device=d), None, ids, torch.float32)",
        "side_network": "ops.side_network([torch.zeros(4, 1, 64, device=d).half()], [], ids, None, "
        "[torch.zeros(s, device=d) for s in ((1, 8, 64), (1, 8), (1, 64, 8), (1, 64), (1,))], "
        "[64], [0, -1], 'none', 'relu', 1.0, torch.half, 0, 0)",
        "deduplicate": "ops.deduplicate(ids - 5, 9)",
    }
    program = (
        "import torch; from crossan_fast import _build; _build.load('cuda')\n"
        "d = 'cuda'; ops = torch.ops.crossan_fast_cuda; ids = torch.tensor([0, 4], device=d)\n"
        f"{calls[call]}\ntorch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    expected = (
        "expected ids in [0, 2^39)" if call == "deduplicate" else "an id is outside of the states' rows"
    )
    assert done.returncode != 0 and expected in done.stdout + done.stderr


def _fusion_case(gpu, count, width, hidden, dtype, absent):
    generator = torch.Generator(gpu).manual_seed(count)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=gpu) * scale).to(dtype).float()

    modalities = range(4)
    weights = FusionWeights(
        [draw(width, 768, scale=768**-0.5) for _ in modalities],
        [draw(width, scale=0.2) for _ in modalities],
        draw(4, 4 * width, scale=0.3),
        draw(4, scale=0.2),
        draw(4, hidden, width, scale=width**-0.5),
        draw(4, hidden, scale=0.2),
        draw(4, width, hidden, scale=hidden**-0.5),
        draw(4, width, scale=0.2),
    )
    present = torch.rand(count, 4, generator=generator, device=gpu) < 0.7 if absent else None
    counts = torch.randint(0, 4, (count,), generator=generator, device=gpu)
    hidden_states = [draw(count, 768).to(dtype) for _ in modalities]
    return hidden_states, weights, present, counts, draw(count, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize(
    "count, width, hidden, absent", [(704, 64, 256, False), (5000, 64, 256, True), (130, 128, 72, True)]
)
def test_fusion(gpu, dtype, top_k, count, width, hidden, absent):
    states, weights, present, counts, grad = _fusion_case(gpu, count, width, hidden, dtype, absent)
    items, assigned, mean, saved = _cuda._fusion(states, weights, present, top_k, counts, dtype)
    flat = [*states, *weights.head_weight, *weights.head_bias, *weights[2:]]
    leaves = [t.double().requires_grad_() for t in flat]
    exact = FusionWeights(leaves[4:8], leaves[8:12], *leaves[12:])
    # Items whose choice a rounding of the router decides may go either way: they are left out of the sums.
    wide = fusion_reference(leaves[:4], exact, present=present, top_k=top_k, counts=counts)
    share = _cuda._route(saved[1], present, top_k, counts)[1]
    e = torch.cat(
        [torch.nn.functional.linear(h, w, b) for h, w, b in zip(leaves[:4], *exact[:2], strict=True)], 1
    )
    if present is not None:
        e = torch.where(present.repeat_interleave(width, 1), e, 0)
    logits = torch.nn.functional.linear(e, exact.router_weight, exact.router_bias)
    exists = torch.ones_like(share, dtype=torch.bool) if present is None else present
    probability = _softmax(logits, exists)
    same = (_top(probability, exists, top_k or 4) == (share != 0)).all(1)
    assert same.double().mean() > 0.95
    grad = torch.where(same[:, None], grad, 0)
    balance = 4 * (assigned * mean).sum()
    assert _error(items[same], wide.items[same].detach()) < 2e-2
    assert _error(balance, wide.balance.detach()) < 2e-2
    wide.items.backward(grad.double())
    gradients = _cuda._fusion_backward(
        grad, torch.zeros(4, device=gpu), saved, states, weights, present, top_k, counts, dtype
    )
    for got, leaf, like in zip((*gradients[0], *gradients[1]), leaves, flat, strict=True):
        assert got.dtype == like.dtype and _error(got, leaf.grad) < 5e-2
    for a, b in zip(
        (*gradients[0], *gradients[1]),
        (
            t
            for group in _cuda._fusion_backward(
                grad, torch.zeros(4, device=gpu), saved, states, weights, present, top_k, counts, dtype
            )
            for t in group
        ),
        strict=True,
    ):
        assert torch.equal(a, b)  # sums have one order


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("pinned", [False, True])
def test_gather_convert(gpu, stored, pinned):
    states = (torch.randn(300, 7, 768) * 20).to(stored)
    scales = torch.rand(300, 7) if stored == torch.int8 else None
    ids = torch.randint(0, 300, (500,), device=gpu)
    want = states.to(gpu).float() * (1 if scales is None else scales.to(gpu)[:, :, None])

    def place(tensor):
        return tensor.pin_memory() if pinned else tensor.to(gpu)

    factors = None if scales is None else place(scales)
    got = torch.ops.crossan_fast_cuda.gather_convert(place(states), factors, ids, torch.bfloat16)
    assert torch.equal(got, want[ids].bfloat16())
