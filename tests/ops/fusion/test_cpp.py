"""The compiled fusion against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import assert_close, assert_same_bits_on_any_threads, library, needs_cpp, random
from judging import judge_all, together
from torch import Tensor

from crossan_fast.ops.fusion import FusionWeights, fusion, fusion_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


def fusion_weights(widths: list[int], d: int, f: int, dtype: torch.dtype = torch.float64) -> FusionWeights:
    m = len(widths)

    def normal(*shape: int, scale: float) -> Tensor:
        return (random(*shape, seed=sum(shape)) * scale).to(dtype).requires_grad_()

    return FusionWeights(
        [normal(d, w, scale=w**-0.5) for w in widths],
        [normal(d, scale=0.1 + w / 1000) for w in widths],
        normal(m, m * d, scale=0.3),
        normal(m, scale=0.3),
        normal(m, f, d, scale=d**-0.5),
        normal(m, f, scale=0.1),
        normal(m, d, f, scale=f**-0.5),
        normal(m, d, scale=0.1),
    )


def fusion_run(op, hidden, weights, **kwargs) -> list[Tensor]:
    hidden = [h.detach().requires_grad_() for h in hidden]
    items, balance = op(hidden, weights, **kwargs)
    loss = (items * random(*items.shape, seed=9).to(items.dtype)).sum() + 3 * balance
    flat = [*hidden, *weights.head_weight, *weights.head_bias, *weights[2:]]
    return [items.detach(), balance.detach(), *torch.autograd.grad(loss, flat)]


@pytest.mark.parametrize("count", [0, 1, 130])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("absent", [False, True])
def test_equals_the_definition(count, top_k, absent):
    widths = [12, 20, 12]
    weights = fusion_weights(widths, 6, 10)
    hidden = [random(count, w, seed=w) for w in widths]
    generator = torch.Generator().manual_seed(5)
    present = torch.rand(count, 3, generator=generator) > 0.4 if absent else None
    counts = torch.randint(0, 5, (count,), generator=generator) if absent else None
    arguments = {"present": present, "top_k": top_k, "counts": counts}
    got = fusion_run(fusion, hidden, weights, backend="cpp", **arguments)
    assert_close(got, fusion_run(fusion_reference, hidden, weights, **arguments), rtol=1e-9, atol=1e-10)


def test_with_an_expert_that_no_item_of_a_block_chooses():
    weights, hidden = fusion_weights([12, 20], 64, 256), [random(70, w, seed=w) for w in (12, 20)]
    present = torch.tensor([True, False]).expand(70, 2)
    got = fusion_run(fusion, hidden, weights, backend="cpp", present=present, top_k=1)
    expected = fusion_run(fusion_reference, hidden, weights, present=present, top_k=1)
    assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_worse_than_eagers(dtype):
    widths = [96, 128]
    weights = fusion_weights(widths, 64, 256, dtype)
    exact = FusionWeights(
        *(
            [w.detach().double().requires_grad_() for w in g]
            if isinstance(g, list)
            else g.detach().double().requires_grad_()
            for g in weights
        )
    )
    draws = [  # a gradient of two scalars is one throw of the dice
        [random(200, w, seed=w + 1000 * draw, dtype=dtype) for w in widths] for draw in range(8)
    ]
    truth = together(fusion_run(fusion_reference, [h.double() for h in drawn], exact) for drawn in draws)
    got = together(fusion_run(fusion, drawn, weights, backend="cpp") for drawn in draws)
    judge_all(
        range(len(got)),
        got,
        lambda: together(fusion_run(fusion_reference, drawn, weights) for drawn in draws),
        truth,
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck_on_the_compiled_code(top_k):
    widths = [3, 4, 3]
    weights = fusion_weights(widths, 4, 5)
    hidden = [random(6, w, seed=w).requires_grad_() for w in widths]
    present = torch.ones(6, 3, dtype=torch.bool)
    present[1, 0] = False

    def run(*flat: Tensor) -> tuple[Tensor, Tensor]:
        w = FusionWeights(list(flat[3:6]), list(flat[6:9]), *flat[9:])
        return tuple(fusion(flat[:3], w, present=present, top_k=top_k, backend="cpp"))

    flat = (*hidden, *weights.head_weight, *weights.head_bias, *weights[2:])
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)


def test_bits_do_not_depend_on_threads():
    weights = fusion_weights([40, 30], 16, 20, torch.float32)
    hidden = [random(500, w, seed=w, dtype=torch.float32) for w in (40, 30)]
    assert_same_bits_on_any_threads(lambda: fusion_run(fusion, hidden, weights, backend="cpp"))


def test_missing_weights_are_named():
    users, items = torch.randn(2, 4), torch.randn(6, 4)
    with pytest.raises(ValueError, match="weights: expected 8"):
        library().fusion([users], [items], None, None, None, torch.float32)
