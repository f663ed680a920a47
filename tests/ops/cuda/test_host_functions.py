"""The registered ops on backend "cuda", with the emulator in a GPU's place; why `auto` passes it over."""

import pytest
import torch

from crossan_fast import _build
from crossan_fast.ops import _cuda, _dispatch
from crossan_fast.ops.deduplicate import deduplicate_reference
from crossan_fast.ops.fusion import FusionWeights, fusion_reference
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    SideNetworkWeights,
    features_of,
    side_network_reference,
)


@pytest.fixture
def emulated(ops, monkeypatch):
    monkeypatch.setattr(_cuda, "library", lambda: ops)


def _error(got, exact) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-30))


def _fusion_case(dtype: torch.dtype, presence: bool, counted: bool):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    modalities, width, count = 4, 16, 53
    weights = FusionWeights(
        draw(modalities, modalities * width, scale=0.5),
        draw(modalities, scale=0.2),
        draw(modalities, 4 * width, width, scale=0.3),
        draw(modalities, 4 * width, scale=0.2),
        draw(modalities, width, 4 * width, scale=0.2),
        draw(modalities, width, scale=0.2),
    )
    present = torch.rand(count, modalities, generator=generator) < 0.6 if presence else None
    counts = torch.randint(0, 4, (count,), generator=generator) if counted else None
    return draw(count, modalities, width), weights, present, counts, draw(count, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("presence, counted", [(False, False), (True, True)])
def test_fusion(emulated, dtype, top_k, presence, counted):
    embeddings, weights, present, counts, grad = _fusion_case(dtype, presence, counted)

    def reference(wide):
        flat = [t.detach().to(wide).requires_grad_() for t in (embeddings, *weights)]
        items, balance = fusion_reference(
            flat[0], FusionWeights(*flat[1:]), present=present, top_k=top_k, counts=counts
        )
        torch.autograd.backward((items, balance), (grad.to(wide), torch.tensor(3.0, dtype=wide)))
        return items, balance, [t.grad for t in flat]

    exact_items, exact_balance, exact_grads = reference(torch.float64)
    eager_items, eager_balance, eager_grads = reference(dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (embeddings, *weights)]
    items, assigned, mean, _ = torch.ops.crossan_fast.fusion(
        leaves[0], leaves[1:], present, top_k, counts, dtype, "cuda"
    )
    balance = 4 * (assigned * mean).sum()
    torch.autograd.backward((items, balance), (grad, torch.tensor(3.0)))
    # A tie in a 16-bit router may go another way; here none does.
    floor = 2 * torch.finfo(dtype).eps
    assert _error(items, exact_items) <= 2 * _error(eager_items, exact_items) + floor
    assert _error(balance, exact_balance) <= 2 * _error(eager_balance, exact_balance) + floor
    for leaf, eager, exact in zip(leaves, eager_grads, exact_grads, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert _error(leaf.grad, exact) <= 2 * _error(eager, exact) + floor


def test_side_network_through_autograd(emulated):
    generator = torch.Generator().manual_seed(1)
    structure = SideNetworkStructure((64, 64), ((0,), (1,)))

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    weights = SideNetworkWeights(
        *([draw(*shape) for _ in range(2)] for shape in ((2, 16, 64), (2, 16), (2, 64, 16), (2, 64))),
        [draw(2), draw(2)],
        [draw(24, 64), draw(24, 64)],
        [draw(24), draw(24)],
        [draw(2), draw(2)],
    )
    states, ids = [draw(9, 2, 64), draw(9, 2, 64)], torch.tensor([3, 0, 8, 3, 1])
    leaves = [w.clone().requires_grad_() for w in weights.flatten()]
    static = (*structure.static, torch.bfloat16)
    embeddings = torch.ops.crossan_fast.side_network(states, [], ids, None, leaves, *static, "cuda")[0]
    exact_leaves = [w.double().requires_grad_() for w in weights.flatten()]
    exact = side_network_reference(
        states, structure.unflatten(exact_leaves), structure, ids=ids, dtype=torch.float64
    )
    grad = draw(5, 2, 24)
    embeddings.backward(grad.bfloat16())
    exact.backward(grad.double())
    assert _error(embeddings, exact) < 1e-2
    for got, want in zip(leaves, exact_leaves, strict=True):
        assert got.grad.dtype == torch.float32 and _error(got.grad, want.grad) < 3e-2


def test_deduplicate(emulated):
    item_ids = torch.randint(0, 30, (8, 11))
    got = torch.ops.crossan_fast.deduplicate(item_ids, 40, "cuda")
    for tensor, want in zip(got, deduplicate_reference(item_ids, 40), strict=True):
        assert torch.equal(tensor, want)


def test_auto_passes_the_unmeasured_backend_over(monkeypatch):
    monkeypatch.delenv("CROSSAN_FAST_BACKEND", raising=False)
    # Without Triton, which on a GPU would be picked before.
    monkeypatch.setitem(_dispatch._ORDER, "cuda", {"cuda": "first", "eager": "last"})
    _dispatch._choose.cache_clear()
    with pytest.warns(_dispatch.FallbackWarning, match="cuda: not yet measured on a GPU"):
        choice = _dispatch.choose("fusion", "cuda", torch.bfloat16)
    _dispatch._choose.cache_clear()
    assert choice.backend == "eager"
    assert choice.rejected == (("cuda", _cuda._UNMEASURED),)


@pytest.mark.parametrize(
    "device, dtype, features, reason",
    [
        ("cpu", torch.bfloat16, (), "runs on CUDA devices only"),
        ("cuda", torch.float32, (), "computes in bfloat16, float16, not in float32"),
        ("cuda", torch.bfloat16, ("states_grad",), "states get no gradient"),
    ],
)
def test_refusals(device, dtype, features, reason):
    request = _dispatch.Request("side_network", device, dtype, features)
    assert reason in _dispatch.refusal(request, "cuda")


@pytest.mark.parametrize(
    "widths, pairs, cross, levels, rank, embedding, reason",
    [
        ((64, 64), (), "side", 7, 64, 64, "rules out"),
        ((64, 100), (), "none", 7, 64, 64, "multiples of 64, not [64, 100]"),
        ((64, 128), ((0, 1),), "none", 7, 64, 64, "pair towers of equal widths only"),
        ((64, 128), (), "backbone", 7, 64, 64, "states at equal widths only, not [64, 128]"),
        ((64,) * 5, (), "backbone", 7, 64, 64, "at most 4 modalities with cross='backbone', not 5"),
        ((64,) * 9, (), "none", 7, 64, 64, "at most 8 modalities with cross='none', not 9"),
        ((64, 64), (), "backbone", 9, 64, 64, "at most 8 levels, not 9"),
        ((64, 64), (), "backbone", 7, 128, 64, "multiples of 8 up to 64, not 128"),
        ((64, 64), (), "backbone", 7, 12, 64, "multiples of 8 up to 64, not 12"),
        ((64, 4096), (), "none", 7, 64, 64, "up to width 2560 on this GPU, not 4096"),
        ((64, 64), (), "backbone", 7, 64, 60, "multiples of 8, with 7 levels up to 128, not 60"),
        ((64, 64), (), "backbone", 8, 64, 72, "multiples of 8, with 8 levels up to 64, not 72"),
        ((64, 128), (), "none", 8, 8, 64, None),
        ((64, 128), (), "none", 7, 8, 128, None),
        ((768,) * 3, ((0, 1), (0, 2), (1, 2)), "none", 7, 64, 64, None),
        ((768,) * 4, (), "backbone", 7, 64, 64, None),
    ],
)
def test_structures_are_refused_by_the_limit_s_name(
    emulated, emulate, monkeypatch, widths, pairs, cross, levels, rank, embedding, reason
):
    emulate(architecture=90, shared=227 * 1024)
    monkeypatch.setattr(_cuda, "refuses", lambda request: None)  # a GPU is here, and the part is built
    structure = SideNetworkStructure(widths, (*((m,) for m in range(len(widths))), *pairs), cross)
    features = features_of(structure, levels, rank, embedding)
    found = _dispatch.refusal(_dispatch.Request("side_network", "cuda", torch.bfloat16, features), "cuda")
    assert reason in found if reason else found is None


def test_projected_crosses_are_refused_by_name(emulated, emulate, monkeypatch):
    emulate(architecture=90, shared=227 * 1024)
    monkeypatch.setattr(_cuda, "refuses", lambda request: None)
    structure = SideNetworkStructure((64, 64), ((0,), (1,)), cross_projection="low_rank")
    request = _dispatch.Request("side_network", "cuda", torch.bfloat16, features_of(structure, 7, 64, 64))
    assert "cross_projection='low_rank' rules out" in _dispatch.refusal(request, "cuda")
    arguments = ([torch.zeros(1, 1, 64)] * 2, [], None, None, [torch.zeros(1, 8, 64)], *structure.static)
    with pytest.raises(
        ValueError, match="cross_projection: expected identity with cross gates, got low_rank"
    ):
        _cuda.library().side_network(*arguments, torch.bfloat16)


@pytest.mark.parametrize(
    "features, dtype, reason",
    [
        (("width=60",), torch.bfloat16, "multiples of 8 up to 128, not 60"),
        (("width=136",), torch.bfloat16, "multiples of 8 up to 128, not 136"),
        (("hidden=12",), torch.bfloat16, "a multiple of 8, not 12"),
        (("modalities=17",), torch.bfloat16, "at most 16 modalities, not 17"),
        (("modalities=4", "hidden=256", "width=64"), torch.float32, "computes in bfloat16, float16"),
    ],
)
def test_fusions_are_refused_by_the_limit_s_name(features, dtype, reason):
    assert reason in _dispatch.refusal(_dispatch.Request("fusion", "cuda", dtype, features), "cuda")


def test_build_says_what_is_missing(monkeypatch):
    part = _build.PARTS["cuda"]
    sources = {f.relative_to(_build.CSRC).as_posix() for f in part.sources()}
    assert sources >= {"cuda/deduplicate.cpp", "cuda/deduplicate.cu", "cuda/side_network/hopper.cu"}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert str(part.missing()).startswith("this torch is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "_no_compiler", lambda: None)
    monkeypatch.setattr(_build, "cuda_home", lambda: None)
    assert "nvcc is missing (install the CUDA 13.0 toolkit" in part.missing()


def test_architectures(monkeypatch):
    monkeypatch.delenv("CROSSAN_FAST_CUDA_ARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6), (9, 0)][i])
    assert _build.cuda_architectures() == ["86", "90a"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in _build.cuda_nvcc_flags()
    monkeypatch.setenv("CROSSAN_FAST_CUDA_ARCH", "8.0;9.0a")
    assert _build.cuda_architectures() == ["80", "90a"]
