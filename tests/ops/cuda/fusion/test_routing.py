import pytest
import torch

from crossan_fast.ops.fusion import _softmax, _top


def _reference(logits, present, counts, top_k):
    exists = torch.ones_like(logits, dtype=torch.bool) if present is None else present
    probability = _softmax(logits, exists)
    chosen = _top(probability, exists, top_k) if top_k else exists
    share = _softmax(logits, chosen)
    weight = exists.any(1).to(logits.dtype) * (1 if counts is None else counts)
    assigned = (weight[:, None] * _top(probability, exists, top_k or 1)).sum(0)
    mean = (weight[:, None] * probability).sum(0) / weight.sum()
    return probability, share, assigned / assigned.sum(), mean


def _case(count, experts, presence, counted, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, experts, generator=generator)
    logits[::3] = logits[::3].round()  # ties
    present = torch.rand(count, experts, generator=generator) < 0.6 if presence else None
    counts = torch.randint(0, 5, (count,), generator=generator).float() if counted else None
    return logits, present, counts


@pytest.mark.parametrize("experts, top_k", [(1, 0), (4, 0), (4, 1), (4, 2), (5, 5), (16, 3)])
@pytest.mark.parametrize("presence", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_forward_and_backward_equal_reference(ops, experts, top_k, presence, counted):
    logits, present, counts = _case(300, experts, presence, counted)
    probability, share, assigned, mean, total = ops.routing_forward(logits, present, counts, top_k)
    exact = logits.double().requires_grad_()
    wide = None if counts is None else counts.double()
    want = _reference(exact, present, wide, top_k)
    for got, expected in zip((probability, share, assigned, mean), want, strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-6, atol=1e-7)
    grad_share, grad_mean = torch.randn_like(share), torch.randn(experts)
    torch.autograd.backward((want[1], want[3]), (grad_share.double(), grad_mean.double()))
    grad = ops.routing_backward(grad_share, grad_mean, probability, share, counts, total)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_no_items(ops):
    logits = torch.empty(0, 4)
    probability, share, assigned, mean, total = ops.routing_forward(logits, None, None, 2)
    assert probability.shape == share.shape == (0, 4)
    assert assigned.tolist() == mean.tolist() == [0] * 4 and total.item() == 0
    grad = ops.routing_backward(share, torch.ones(4), probability, share, None, total)
    assert grad.shape == (0, 4)


def test_errors_name_the_argument(ops):
    logits = torch.randn(5, 4)
    cases = [
        ((logits[0], None, None, 0), ValueError, "logits: expected shape"),
        ((logits.double(), None, None, 0), TypeError, "logits: expected Float"),
        ((torch.randn(5, 17), None, None, 0), ValueError, "logits: expected shape"),
        ((logits, torch.ones(5, 3, dtype=torch.bool), None, 0), ValueError, "present: expected shape"),
        ((logits, torch.ones(5, 4), None, 0), TypeError, "present: expected Bool"),
        ((logits, None, torch.ones(4), 0), ValueError, "counts: expected shape"),
        ((logits, None, None, 5), ValueError, "top_k: expected 0"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            ops.routing_forward(*arguments)
