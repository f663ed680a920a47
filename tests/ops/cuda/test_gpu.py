"""The same kernels built by nvcc, on a GPU: what the emulator can't show."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cuda_side_network import DRAWS, HOPPER, MMA, Case, by_passes, error

from crossan_fast import _build
from crossan_fast.ops import _cuda
from crossan_fast.ops._cuda import fusion as cuda_fusion
from crossan_fast.ops.deduplicate import deduplicate_reference
from crossan_fast.ops.fusion import FusionWeights, _softmax, _top, fusion_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def gpu():
    if problem := _build.problem("cuda"):
        pytest.fail(f"a GPU is here, but the CUDA part cannot be built: {problem}")
    return torch.device("cuda")


@pytest.fixture
def ops(gpu):
    return _cuda.library()


@pytest.fixture(params=[MMA, HOPPER], ids=["mma", "hopper"])
def path(request, gpu):
    if request.param == HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs a GPU of compute capability 9.0")
    return request.param


def _case(gpu, count, width, levels, modalities, **changes):
    case = Case(count, (width,) * modalities, levels, embedding=64, rows=count + 9, device=gpu.type)
    return replace(case, **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "count, width, levels, modalities, embedding",
    [
        (1, 64, 1, 1, 24),
        (33, 128, 3, 2, 72),
        (704, 768, 7, 4, 64),
        (5000, 768, 7, 4, 64),
        (640, 1024, 8, 3, 64),
    ],
)
@pytest.mark.parametrize("absent", [False, True])
def test_side_network(gpu, ops, path, dtype, count, width, levels, modalities, embedding, absent):
    case = _case(gpu, count, width, levels, modalities, embedding=embedding, stored=dtype, dtype=dtype)
    replace(case, presence=absent).check(ops, path, draws=DRAWS if count < 100 else 1)


@pytest.mark.parametrize("passes", [("triton", "cuda"), ("cuda", "triton")], ids="-".join)
@pytest.mark.parametrize("count, absent", [(33, True), (704, False)])
def test_a_backend_for_each_pass(gpu, ops, passes, count, absent):
    case = _case(gpu, count, 768, 7, 4, presence=absent)
    case.check(by_passes(*passes), 0, draws=DRAWS if count < 100 else 1)


@pytest.mark.parametrize("gates", [(30, -30, 3, 30, -3), (-30, 30, -3, 3, 30)])
def test_gates_that_are_shut_and_open(gpu, ops, path, gates):
    _case(gpu, 333, 768, 5, 3, gates=gates).check(ops, path)


def test_repeats_bit_for_bit(gpu, ops, path):
    case = _case(gpu, 2000, 768, 7, 4, presence=True)
    first = case.run(ops, path)
    for _ in range(20):
        poison = torch.full((64 << 20,), float("nan"), device=gpu)  # what the next call's memory held
        del poison
        for a, b in zip(_flat(first), _flat(case.run(ops, path)), strict=True):
            assert torch.equal(a, b)


def _flat(run):
    embeddings, saved, grads = run
    return [embeddings, saved, *grads]


@pytest.mark.parametrize("count", [0, 704, 2049, 100_000])
def test_deduplicate(gpu, ops, count):
    item_ids = torch.randint(0, 20_314, (count,), device=gpu)
    got = ops.deduplicate(item_ids, count + 1)
    for tensor, want in zip(got, deduplicate_reference(item_ids.cpu(), count + 1), strict=True):
        assert torch.equal(tensor.cpu(), want)


def test_nothing_waits_for_the_device(gpu, ops, path):
    """A CUDA graph captures deduplicate, forward and backward, and replays them on new ids."""
    case = _case(gpu, 65, 128, 3, 2)
    states, scales, _, *rest = case.arguments(path)
    grad = case.make()[-1]
    item_ids = torch.randint(0, 60, (8, 11), device=gpu)

    def step():
        ids, *_ = ops.deduplicate(item_ids, 65)
        embeddings, *kept = ops.side_network(states, scales, ids, *rest)
        return [embeddings, *ops.side_network_backward(grad, *kept, states, scales, ids, *rest)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    item_ids.copy_(torch.randint(0, 60, (8, 11), device=gpu))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_backward_in_parts(gpu, ops, path):
    """Parts of the items give the gradients of the whole, up to the order of fp32 sums."""
    case = _case(gpu, 1500, 128, 3, 2, presence=True)
    *_, whole = case.run(ops, path)
    *_, parts = case.run(ops, path, backward_items=400)
    for a, b in zip(whole, parts, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("ids", [torch.int32, None])
def test_stored_types_and_ids(gpu, ops, path, stored, ids):
    _case(gpu, 130, 128, 3, 2, stored=stored, ids=ids).check(ops, path)


@pytest.mark.parametrize("absent", [False, True])
def test_pair_towers(gpu, ops, path, absent):
    case = _case(gpu, 333, 768, 7, 3, cross="none", pairs=True, activation="relu", presence=absent)
    case.check(ops, path)


def test_rows_beyond_two_to_the_31_elements(gpu, ops, path):
    rows, levels, width = 420_000, 7, 768
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    states = [torch.empty(rows, levels, width, dtype=torch.bfloat16, device=gpu).normal_()]
    ids = torch.tensor([0, rows - 1, rows - 7, 399_458], device=gpu)
    _, scales, _, *rest = _case(gpu, 4, width, levels, 1).arguments(path)
    got = ops.gather_convert(states[0], None, ids, torch.float32)
    assert torch.equal(got, states[0][ids].float())
    embeddings, *_ = ops.side_network(states, scales, ids, *rest)
    near, *_ = ops.side_network([states[0][ids]], scales, None, *rest)
    assert torch.equal(embeddings, near)


@pytest.mark.parametrize("call", ["gather", "side_network", "deduplicate"])
def test_wrong_ids_end_the_launch_with_a_message(gpu, call):
    """In a process of its own: what a device-side failure leaves behind is no CUDA context to go on with."""
    calls = {
        "gather": "ops.gather_convert(torch.zeros(4, 2, 8, device=d), None, ids, torch.float32)",
        "side_network": "ops.side_network([torch.zeros(4, 1, 64, device=d).half()], [], ids, None, "
        "[torch.zeros(s, device=d) for s in "
        "((1, 8, 64), (1, 8), (1, 64, 8), (1, 64), (1,), (8, 64), (8,))], "
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

    weights = FusionWeights(
        draw(4, 4 * width, scale=0.3),
        draw(4, scale=0.2),
        draw(4, hidden, width, scale=width**-0.5),
        draw(4, hidden, scale=0.2),
        draw(4, width, hidden, scale=hidden**-0.5),
        draw(4, width, scale=0.2),
    )
    present = torch.rand(count, 4, generator=generator, device=gpu) < 0.7 if absent else None
    counts = torch.randint(0, 4, (count,), generator=generator, device=gpu)
    return draw(count, 4, width).to(dtype), weights, present, counts, draw(count, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize(
    "count, width, hidden, absent", [(704, 64, 256, False), (5000, 64, 256, True), (130, 128, 72, True)]
)
def test_fusion(gpu, ops, dtype, top_k, count, width, hidden, absent):
    embeddings, weights, present, counts, grad = _fusion_case(gpu, count, width, hidden, dtype, absent)
    arguments = (embeddings, list(weights), present, top_k, counts, dtype)
    items, assigned, mean, logits = cuda_fusion.forward(*arguments)
    leaves = [t.double().requires_grad_() for t in (embeddings, *weights)]
    exact = FusionWeights(*leaves[1:])
    # Items whose choice a rounding of the router decides may go either way: they are left out of the sums.
    wide = fusion_reference(leaves[0], exact, present=present, top_k=top_k, counts=counts)
    share = cuda_fusion._route(logits, present, top_k, counts)[1]
    exists = torch.ones_like(share, dtype=torch.bool) if present is None else present
    e = torch.where(exists[:, :, None], leaves[0], 0).flatten(1)
    probability = _softmax(torch.nn.functional.linear(e, exact.router_weight, exact.router_bias), exists)
    same = (_top(probability, exists, top_k or 4) == (share != 0)).all(1)
    assert same.double().mean() > 0.95
    grad = torch.where(same[:, None], grad, 0)
    balance = 4 * (assigned * mean).sum()
    assert error(items[same], wide.items[same].detach()) < 2e-2
    assert error(balance, wide.balance.detach()) < 2e-2
    wide.items.backward(grad.double())
    gradients = cuda_fusion.backward(grad, torch.zeros(4, device=gpu), logits, *arguments)
    for got, leaf, like in zip(gradients, leaves, (embeddings, *weights), strict=True):
        assert got.dtype == like.dtype and error(got, leaf.grad) < 5e-2
    again = cuda_fusion.backward(grad, torch.zeros(4, device=gpu), logits, *arguments)
    assert all(map(torch.equal, gradients, again))  # sums have one order


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("pinned", [False, True])
def test_gather_convert(gpu, ops, stored, pinned):
    states = (torch.randn(300, 7, 768) * 20).to(stored)
    scales = torch.rand(300, 7) if stored == torch.int8 else None
    ids = torch.randint(0, 300, (500,), device=gpu)
    want = states.to(gpu).float() * (1 if scales is None else scales.to(gpu)[:, :, None])

    def place(tensor):
        return tensor.pin_memory() if pinned else tensor.to(gpu)

    factors = None if scales is None else place(scales)
    got = ops.gather_convert(place(states), factors, ids, torch.bfloat16)
    assert torch.equal(got, want[ids].bfloat16())


def test_pinned_rows_are_kept_until_they_are_read(gpu, ops):
    """Freed at once, while the stream still waits: the next pinned tensor must not get their memory."""
    states = torch.randn(64, 7, 768).pin_memory()
    place, want = states.data_ptr(), states.clone()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    got = ops.gather_convert(states, None, torch.arange(64, device=gpu), torch.float32)
    del states
    other = torch.zeros(64, 7, 768, pin_memory=True)
    assert other.data_ptr() != place
    assert torch.equal(got.cpu(), want)
