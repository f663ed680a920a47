"""The compiled fusion against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import assert_close, assert_same_bits_on_any_threads, library, needs_cpp, random
from judging import judge_all, together
from torch import Tensor

from crossan_fast.ops.fusion import FusionWeights, fusion, fusion_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


def fusion_weights(m: int, d: int, f: int, dtype: torch.dtype = torch.float64) -> FusionWeights:
    def normal(*shape: int, scale: float) -> Tensor:
        return (random(*shape, seed=sum(shape)) * scale).to(dtype).requires_grad_()

    return FusionWeights(
        normal(m, m * d, scale=0.3),
        normal(m, scale=0.3),
        normal(m, f, d, scale=d**-0.5),
        normal(m, f, scale=0.1),
        normal(m, d, f, scale=f**-0.5),
        normal(m, d, scale=0.1),
    )


def fusion_run(op, embeddings, weights, **kwargs) -> list[Tensor]:
    embeddings = embeddings.detach().requires_grad_()
    items, balance = op(embeddings, weights, **kwargs)
    loss = (items * random(*items.shape, seed=9).to(items.dtype)).sum() + 3 * balance
    return [items.detach(), balance.detach(), *torch.autograd.grad(loss, [embeddings, *weights])]


@pytest.mark.parametrize("count", [0, 1, 130])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("absent", [False, True])
def test_equals_the_definition(count, top_k, absent):
    weights, embeddings = fusion_weights(3, 6, 10), random(count, 3, 6)
    generator = torch.Generator().manual_seed(5)
    present = torch.rand(count, 3, generator=generator) > 0.4 if absent else None
    counts = torch.randint(0, 5, (count,), generator=generator) if absent else None
    arguments = {"present": present, "top_k": top_k, "counts": counts}
    got = fusion_run(fusion, embeddings, weights, backend="cpp", **arguments)
    assert_close(got, fusion_run(fusion_reference, embeddings, weights, **arguments), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d", [4, 6, 24, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_does_not_depend_on_those_beside_it(d, dtype):
    """Bit for bit: equal items have equal embeddings, wherever they stand."""
    weights = fusion_weights(2, d, 4 * d, dtype)
    for seed in range(5):
        item = random(1, 2, d, seed=seed).to(dtype)
        alone, grad = result_of(weights, item)
        for count in (2, 6, 7, 12, 59, 61):
            items, grads = result_of(weights, item.expand(count, 2, d).contiguous())
            assert torch.equal(items, alone.expand_as(items)) and torch.equal(grads, grad.expand_as(grads))


def result_of(weights: FusionWeights, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Items, and the gradient of the sum of their squares by the embeddings."""
    embeddings = embeddings.clone().requires_grad_()
    items = fusion(embeddings, weights, backend="cpp").items
    return items.detach(), torch.autograd.grad(items.square().sum(), embeddings)[0]


def test_with_an_expert_that_no_item_of_a_block_chooses():
    weights, embeddings = fusion_weights(2, 64, 256), random(70, 2, 64)
    present = torch.tensor([True, False]).expand(70, 2)
    got = fusion_run(fusion, embeddings, weights, backend="cpp", present=present, top_k=1)
    expected = fusion_run(fusion_reference, embeddings, weights, present=present, top_k=1)
    assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_worse_than_eagers(dtype):
    weights = fusion_weights(2, 64, 256, dtype)
    exact = FusionWeights(*(w.detach().double().requires_grad_() for w in weights))
    # A gradient of two scalars is one throw of the dice.
    draws = [random(200, 2, 64, seed=draw, dtype=dtype) for draw in range(8)]
    truth = together(fusion_run(fusion_reference, drawn.double(), exact) for drawn in draws)
    got = together(fusion_run(fusion, drawn, weights, backend="cpp") for drawn in draws)
    judge_all(
        range(len(got)),
        got,
        lambda: together(fusion_run(fusion_reference, drawn, weights) for drawn in draws),
        truth,
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck_on_the_compiled_code(top_k):
    leaves = [random(6, 3, 4).requires_grad_(), *fusion_weights(3, 4, 5)]
    present = torch.ones(6, 3, dtype=torch.bool)
    present[1, 0] = False

    def run(embeddings: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(fusion(embeddings, FusionWeights(*weights), present=present, top_k=top_k, backend="cpp"))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_bits_do_not_depend_on_threads():
    weights = fusion_weights(2, 16, 20, torch.float32)
    embeddings = random(500, 2, 16, dtype=torch.float32)
    assert_same_bits_on_any_threads(lambda: fusion_run(fusion, embeddings, weights, backend="cpp"))


def test_missing_weights_are_named():
    embeddings, weights = random(2, 3, 4), list(fusion_weights(3, 4, 5))
    for given in (weights[:-1], [*weights, weights[0]]):
        with pytest.raises(ValueError, match="weights: expected 6"):
            library().fusion(embeddings, given, None, None, None, torch.float64)
