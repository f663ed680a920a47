"""Heads as the side network takes them: one Linear, whatever the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from crossan_fast.modules.fusion import folded, make_head


def test_one_layer_is_itself() -> None:
    head = make_head(12, 5, two_layers=False)
    weight, bias = folded(head)
    assert weight is head.weight and bias is head.bias


def test_two_layers_fold_to_their_product_and_share_its_gradient() -> None:
    head = make_head(12, 5, two_layers=True).double()
    h, grad = torch.randn(9, 12, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    have, want = F.linear(h, *folded(head)), F.linear(head.inner(h), head.weight, head.bias)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    leaves = list(head.parameters())
    assert len(leaves) == 4
    for a, b in zip(*(torch.autograd.grad(e, leaves, grad) for e in (have, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_round_the_product() -> None:
    head = make_head(12, 5, two_layers=True)
    plain = folded(head)
    with torch.autocast("cpu", torch.bfloat16):
        cast = folded(head)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))
