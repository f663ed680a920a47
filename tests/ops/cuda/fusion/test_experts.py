"""MOMEF's experts on their lists, on the emulator, against float64."""

import pytest
import torch
import torch.nn.functional as F


def _case(items, experts, width, hidden, dtype=torch.bfloat16, weights=torch.float32, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    share = torch.rand(items, experts, generator=generator)
    share *= torch.rand(items, experts, generator=generator) < keep
    matrices = [
        draw(experts, hidden, width, scale=width**-0.5),
        draw(experts, hidden, scale=0.2),
        draw(experts, width, hidden, scale=hidden**-0.5),
        draw(experts, width, scale=0.2),
    ]
    return draw(items, experts * width), share, [m.to(weights) for m in matrices], draw(items, width)


def _reference(joined, share, weights, grad):
    """Output and gradients by the definition; an expert that does not run adds nothing, whatever it holds."""
    leaves = [t.double().requires_grad_() for t in (joined, share, *weights)]
    joined, share, w1, b1, w2, b2 = leaves
    output = torch.zeros(grad.shape, dtype=torch.float64)
    for m, e in enumerate(joined.view(len(joined), len(w1), -1).unbind(1)):
        out = e + F.linear(F.gelu(F.linear(e, w1[m], b1[m])), w2[m], b2[m])
        output = output + torch.where(share[:, m, None] != 0, share[:, m, None] * out, 0)
    output.backward(grad.double())
    return output.detach(), [leaf.grad for leaf in leaves]


def _error(got, exact) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _check(ops, joined, share, weights, grad):
    output, grads = _reference(joined, share, weights, grad)
    # Twice a rounding of the 16-bit type for each product on the way: one forward, two backward.
    unit = torch.finfo(joined.dtype).eps
    got = ops.experts_forward(joined, share, *weights)
    assert got.dtype == joined.dtype and _error(got, output) < 2 * unit
    gradients = ops.experts_backward(grad, joined, share, *weights)
    # The reference lets a share of zero have a gradient; an expert that did not run has none.
    grads[1] = torch.where(share != 0, grads[1], 0)
    for found, want, like in zip(gradients, grads, (None, None, *weights), strict=True):
        assert found.dtype == (torch.float32 if like is None else like.dtype)
        assert _error(found, want) < 4 * unit
    return got, gradients


@pytest.mark.parametrize(
    "items, experts, width, hidden",
    [(1, 1, 8, 8), (64, 2, 64, 256), (65, 4, 64, 72), (150, 3, 16, 64), (70, 2, 128, 128), (40, 16, 72, 8)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes(ops, items, experts, width, hidden, dtype):
    _check(ops, *_case(items, experts, width, hidden, dtype))


@pytest.mark.parametrize("keep", [0.0, 0.03, 1.0])
def test_few_and_many_run(ops, keep):
    _check(ops, *_case(140, 4, 16, 72, keep=keep))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(ops, weights):
    _check(ops, *_case(40, 2, 32, 64, torch.bfloat16, weights))


def test_experts_that_do_not_run_read_nothing(ops):
    joined, share, weights, grad = _case(90, 3, 16, 64)
    share[:, 1] = 0
    for tensor in weights:
        tensor[1] = float("inf")
    joined.view(90, 3, 16)[share == 0] = float("nan")
    clean = [t.clone() for t in weights]
    for tensor in clean:
        tensor[1] = 0
    zeros = joined.nan_to_num(0)
    output, gradients = _check(ops, zeros, share, clean, grad)
    assert torch.equal(ops.experts_forward(joined, share, *weights), output)
    for got, want in zip(ops.experts_backward(grad, joined, share, *weights), gradients, strict=True):
        assert torch.equal(got, want)
    assert not any(g[1].any() for g in gradients[2:])


def test_any_order_of_threads_and_any_device_give_the_same_bits(ops, emulate):
    case = _case(200, 2, 16, 64)
    first = None
    for seed in range(3):
        emulate(seed=seed)
        results = [
            ops.experts_forward(*case[:2], *case[2]),
            *ops.experts_backward(case[3], *case[:2], *case[2]),
        ]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    for processors in (1, 4, 132):  # one to many splits of the items
        emulate(processors=processors)
        _check(ops, *case)


def test_no_items(ops):
    joined, share, weights, grad = _case(0, 3, 16, 64)
    assert ops.experts_forward(joined, share, *weights).shape == (0, 16)
    gradients = ops.experts_backward(grad, joined, share, *weights)
    assert not any(g.any() for g in gradients)


def test_strided_and_misaligned_input(ops):
    joined, share, weights, _ = _case(30, 2, 16, 64)
    want = ops.experts_forward(joined, share, *weights)
    shifted = torch.empty(30 * 32 + 1, dtype=joined.dtype)[1:].view(30, 32).copy_(joined)
    strided = [w.mT.contiguous().mT if w.dim() == 3 else w for w in weights]
    assert torch.equal(ops.experts_forward(shifted, share.T.contiguous().T, *strided), want)


def test_errors_name_the_argument(ops):
    joined, share, (w1, b1, w2, b2), grad = _case(30, 2, 16, 64)
    cases = [
        ((joined.float(), share, w1, b1, w2, b2), TypeError, "joined: expected float16"),
        ((joined[:, :-1], share, w1, b1, w2, b2), ValueError, "joined: expected shape"),
        ((joined, share[:-1], w1, b1, w2, b2), ValueError, "share: expected shape"),
        ((joined, share.double(), w1, b1, w2, b2), TypeError, "share: expected Float"),
        ((joined, share, w1[0], b1, w2, b2), ValueError, "w1: expected shape"),
        ((joined, share, w1[:, :, :12], b1, w2, b2), ValueError, "w1: expected a width"),
        ((joined, share, w1[:, :60], b1, w2, b2), ValueError, "w1: expected hidden units"),
        ((joined, share, w1.double(), b1, w2, b2), TypeError, "w1: expected float32"),
        ((joined, share, w1, b1[:, :-1], w2, b2), ValueError, "b1: expected shape"),
        ((joined, share, w1, b1, w2.half(), b2), TypeError, "w2: expected Float"),
        ((joined, share, w1, b1, w2, b2[:, :-1]), ValueError, "b2: expected shape"),
        ((joined, share, w1[:0], b1, w2, b2), ValueError, "w1: expected 1 to 16 experts"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            ops.experts_forward(*arguments)
    with pytest.raises(ValueError, match="grad_output: expected shape"):
        ops.experts_backward(grad[:-1], joined, share, w1, b1, w2, b2)
