"""The same kernels built by nvcc, on a GPU: what the emulator can't show."""

import pytest
import torch

from crossan_fast import _build
from crossan_fast.ops import _cuda
from crossan_fast.ops.deduplicate import deduplicate_reference
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
    floor = 2 * torch.finfo(dtype).eps
    for got, eager, exact in zip(outputs, eager_outputs, exact_outputs, strict=True):
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor / 8
    for got, eager, exact in zip(
        *(
            [torch.cat([t.double().flatten() for t in group]) for group in structure.unflatten(flat) if group]
            for flat in (grads, eager_grads, exact_grads)
        ),
        strict=True,
    ):
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor


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
