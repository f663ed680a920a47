"""Heads as the side network takes them: one Linear, whatever the layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossan_fast.modules.fusion import concat, folded, make_head


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


@pytest.mark.parametrize("width", [6, 33, 64])
def test_what_is_concatenated_does_not_depend_on_the_items_beside_it(width: int) -> None:
    """Equal items have to tie: those of a catalogue's last, short chunk with those of the others, too."""
    linear, item = nn.Linear(3 * width, width), torch.randn(1, 3, width)
    with torch.no_grad():
        alone = concat(linear, item)
        for count in (2, 3, 7, 50, 300):
            items = concat(linear, item.repeat(count, 1, 1))
            assert torch.equal(items, alone.expand_as(items))
