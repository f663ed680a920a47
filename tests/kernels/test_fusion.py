"""The fusion kernels against the reference in float64."""

from __future__ import annotations

import os

import pytest
import torch
from judging import judge_all

from crossan_fast.kernels import fusion
from crossan_fast.kernels.fusion import host
from crossan_fast.ops.fusion import FusionWeights, fusion_reference
from crossan_fast.ops.fusion import fusion as fusion_op

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


def make(count, m, width, inner, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

    weights = FusionWeights(
        router_weight=normal(m, m * width, scale=0.2),
        router_bias=normal(m),
        w1=normal(m, inner, width, scale=width**-0.5),
        b1=normal(m, inner),
        w2=normal(m, width, inner, scale=inner**-0.5),
        b2=normal(m, width),
    )
    return normal(count, m, width), weights


def some_present(count, modalities, seed=1):
    """Every number of present modalities, none included."""
    present = torch.rand(count, modalities, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[0], present[-1] = False, True
    return present.to(DEVICE)


def kernel(embeddings, weights, grad, *, present=None, top_k=None, counts=None, dtype, grad_balance=0.5):
    m = embeddings.shape[1]
    call = (embeddings, weights, present, top_k, counts, dtype)
    items, assigned, probability, logits = fusion.forward(*call)
    grads = fusion.backward(grad.to(dtype), grad_balance * m * assigned, logits, *call)
    return [items, m * (assigned * probability).sum(), *grads]


def reference(embeddings, weights, grad, *, dtype, grad_balance=0.5, **options):
    e, *tensors = (t.to(dtype).requires_grad_() for t in (embeddings, *weights))
    out = fusion_reference(e, FusionWeights(*tensors), **options)
    loss = (out.items * grad.to(dtype)).sum() + grad_balance * out.balance
    return [out.items.detach(), out.balance.detach(), *torch.autograd.grad(loss, (e, *tensors))]


NAMES = ("items", "balance", "embeddings", *FusionWeights._fields)


def test_gradients_of_weights_of_several_types_are_not_rounded_to_the_first_ones():
    e, weights = make(5, 2, 8, 16, torch.float32)
    grad = torch.randn(5, 8, device=DEVICE)
    mixed = weights._replace(router_weight=weights.router_weight.to(torch.bfloat16))
    got = kernel(e, mixed, grad, dtype=torch.float32)[3:]
    wide = weights._replace(router_weight=mixed.router_weight.float())
    for a, b, weight in zip(got, kernel(e, wide, grad, dtype=torch.float32)[3:], mixed, strict=True):
        assert a.dtype == weight.dtype and torch.equal(a, b.to(weight.dtype))


def compare(embeddings, weights, dtype, **options):
    """One choice for all: the experts that float64 picks, which a margin keeps from rounding away."""
    grad = torch.randn(len(embeddings), weights.w1.shape[2], generator=torch.Generator().manual_seed(5))
    grad = grad.to(dtype).to(DEVICE)
    actual = kernel(embeddings, weights, grad, dtype=dtype, **options)
    truth = reference(embeddings, weights, grad, dtype=torch.float64, **options)
    judge_all(NAMES, actual, lambda: reference(embeddings, weights, grad, dtype=dtype, **options), truth)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"present": True, "counts": True}, {"top_k": 2, "present": True}],
    ids=["all", "present", "top_k"],
)
def test_matches_float64(options, dtype, few, monkeypatch):
    monkeypatch.setattr(host, "_FEW", 4096 if few else 0)
    embeddings, weights = make(41, 3, 20, 48, dtype)
    options = dict(options)
    if options.pop("counts", False):
        options["counts"] = torch.arange(41, device=DEVICE) % 4
    if options.pop("present", False):
        options["present"] = some_present(41, 3)
    if "top_k" in options:
        # Rounding must not decide who is chosen: set the router's biases far apart.
        weights = weights._replace(router_bias=torch.tensor([2.0, -2.0, 6.0], dtype=dtype, device=DEVICE))
    compare(embeddings, weights, dtype, **options)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("modalities", "width", "inner", "dtype"),
    [
        (1, 70, 40, torch.float32),
        (1, 70, 40, torch.bfloat16),
        (5, 132, 300, torch.bfloat16),
        pytest.param(5, 132, 300, torch.float32, marks=pytest.mark.long),
    ],
)
def test_other_numbers_of_modalities_and_wide_embeddings(modalities, width, inner, dtype):
    embeddings, weights = make(19, modalities, width, inner, dtype)
    compare(embeddings, weights, dtype)


@pytest.mark.long
def test_other_tiles_give_the_same(monkeypatch):
    """All that may be searched, of any device: one expert a program or all, other tiles and parts."""
    embeddings, weights = make(37, 2, 8, 40, torch.float32)
    grad = torch.randn(37, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"present": some_present(37, 2), "top_k": 1, "dtype": torch.float32}
    expected = kernel(embeddings, weights, grad, **options)
    configs = {
        (c.items[:2], c.weights[:2], c.apart): c  # warps and stages make no other code in the interpreter
        for device in ("sm_80", "sm_90")
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
        for width in (8, 100)
        for count in (37, 5000)
        for c in host.candidates(device, dtype, tf32, width, count)
    }
    assert {c.apart for c in configs.values()} == {True, False}
    for config in configs.values():
        monkeypatch.setattr(host, "config", lambda *_, config=config: config)
        for own, first in zip(kernel(embeddings, weights, grad, **options), expected, strict=True):
            torch.testing.assert_close(own, first)


def test_ties_go_to_the_modality_that_comes_first():
    embeddings, weights = make(9, 3, 16, 16, torch.float32)
    zero = [torch.zeros_like(t) for t in (weights.router_weight, weights.router_bias)]
    weights = weights._replace(router_weight=zero[0], router_bias=zero[1])
    present = torch.ones(9, 3, dtype=torch.bool, device=DEVICE)
    present[4:, 0] = False
    for top_k in (1, 2):
        items, assigned, *_ = fusion.forward(embeddings, weights, present, top_k, None, torch.float32)
        expected = fusion_reference(embeddings, weights, present=present, top_k=top_k)
        torch.testing.assert_close(items, expected.items)
        shares = [4, 5, 0] if top_k == 1 else [4, 9, 5]
        torch.testing.assert_close(assigned.cpu(), torch.tensor(shares) / sum(shares))


def test_experts_that_nobody_chose_do_not_run():
    embeddings, weights = make(21, 2, 16, 16, torch.float32)
    weights = weights._replace(router_bias=torch.tensor([50.0, -50.0], device=DEVICE))
    weights.w1[1] = float("nan")
    weights.b2[1] = float("nan")
    grad = torch.randn(21, 16, device=DEVICE)
    out = kernel(embeddings, weights, grad, top_k=1, dtype=torch.float32)
    assert all(torch.isfinite(t).all() for t in out)
    assert not any(out[NAMES.index(name)][1].any() for name in ("w1", "b1", "w2", "b2"))


def test_an_item_without_modalities_gets_zeros_and_gives_no_gradient():
    """And what stands for the embedding of a modality that it lacks is never computed with."""
    embeddings, weights = make(6, 2, 16, 16, torch.float32)
    present = torch.ones(6, 2, dtype=torch.bool, device=DEVICE)
    present[3] = False
    present[1, 0] = False
    embeddings[~present] = float("nan")
    items, _, *grads = kernel(
        embeddings, weights, torch.ones(6, 16, device=DEVICE), present=present, dtype=torch.float32
    )
    assert not items[3].any() and not grads[0][~present].any()
    assert all(t.isfinite().all() for t in (items, *grads))


def test_no_items():
    embeddings, weights = make(0, 2, 16, 16, torch.float32)
    out = kernel(embeddings, weights, torch.zeros(0, 16, device=DEVICE), dtype=torch.float32)
    assert out[0].shape == (0, 16) and out[1] == 0
    assert [t.shape for t in out[2:]] == [t.shape for t in (embeddings, *weights)]
    assert not any(t.any() for t in out)


def test_strides_do_not_matter_and_runs_repeat_bit_for_bit():
    embeddings, weights = make(37, 2, 16, 32, torch.bfloat16)
    present, grad = some_present(37, 2), torch.randn(37, 16, device=DEVICE)
    expected = kernel(embeddings, weights, grad, present=present, dtype=torch.bfloat16)
    strided = FusionWeights(*(t.mT.contiguous().mT if t.dim() > 1 else t for t in weights))
    wide = torch.cat([embeddings, embeddings], 1)[:, :2]
    turned = present.T.contiguous().T, grad.T.contiguous().T
    assert not any(t.is_contiguous() for t in (wide, strided.w1, *turned))
    for repeat in (
        kernel(wide, strided, turned[1], present=turned[0], dtype=torch.bfloat16),
        kernel(embeddings, weights, grad, present=present, dtype=torch.bfloat16),
    ):
        assert all(torch.equal(a, b) for a, b in zip(repeat, expected, strict=True))


def test_full_precision_weights_under_half_precision_compute():
    embeddings, weights = make(23, 2, 16, 32, torch.float32)
    grad = torch.randn(23, 16, device=DEVICE)
    out = kernel(embeddings, weights, grad, dtype=torch.bfloat16)
    assert out[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in out[2:])
    rounded = FusionWeights(*(t.bfloat16() for t in weights))
    halves = embeddings.bfloat16()
    truth = reference(embeddings, weights, grad, dtype=torch.float64)
    judge_all(NAMES, out, lambda: reference(halves, rounded, grad, dtype=torch.bfloat16), truth)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_what_all_items_count_is_added_up_by_torch_or_by_programs(missing, counted, monkeypatch):
    embeddings, weights = make(150, 2, 8, 8, torch.float32)
    grad = torch.randn(150, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {
        "present": some_present(150, 2) if missing else None,
        "counts": torch.arange(150, device=DEVICE) if counted else None,
        "dtype": torch.float32,
    }
    few = kernel(embeddings, weights, grad, **options)
    monkeypatch.setattr(host, "_FEW", 0)
    for many, own in zip(kernel(embeddings, weights, grad, **options), few, strict=True):
        torch.testing.assert_close(many, own)


def test_the_balance_is_left_out_where_it_is_not_asked_for():
    embeddings, weights = make(5, 2, 8, 8, torch.float32)
    for backend in ("triton", "eager"):
        asked = fusion_op(embeddings, weights, backend=backend)
        left_out = fusion_op(embeddings, weights, balance=False, backend=backend)
        assert left_out.balance is None and torch.equal(left_out.items, asked.items)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("count", [21, 41])
def test_without_a_gradient_of_the_balance_it_is_that_of_zeros(count, monkeypatch):
    monkeypatch.setattr(host, "_FEW", 30)
    embeddings, weights = make(count, 3, 20, 24, torch.float32)
    call = (embeddings, weights, some_present(count, 3), None, None, torch.float32)
    items, _, probability, logits = fusion.forward(*call)
    found, expected = (
        fusion.backward(torch.ones_like(items), grad, logits, *call)
        for grad in (probability[:0], torch.zeros_like(probability))
    )
    for own, theirs in zip(found, expected, strict=True):
        assert torch.equal(own, theirs)


def test_registered_op_passes_opcheck():
    embeddings, weights = make(5, 2, 8, 8, torch.float32)
    tensors = [t.requires_grad_() for t in weights]
    op = torch.ops.crossan_fast.fusion.default
    torch.library.opcheck(op, (embeddings, tensors, some_present(5, 2), 1, None, torch.float32, "triton"))


def test_gradients_through_the_op_match_eager():
    embeddings, weights = make(5, 2, 8, 8, torch.float32)
    inputs = [t.requires_grad_() for t in (embeddings, weights.w1, weights.router_bias)]
    gradients = []
    for backend in ("triton", "eager"):
        out = fusion_op(embeddings, weights, backend=backend)
        gradients.append(torch.autograd.grad(out.items.square().sum() + out.balance, inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
