"""The plain full_loss against torch's cross entropy."""

from __future__ import annotations

import pytest
import torch

from crossan_fast.ops import full_loss, full_loss_reference


def test_equals_cross_entropy_and_its_gradients():
    users = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    items = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 3, 7], [1, 0, 2], [5, 5, 4], [0, 0, 6]])
    want = torch.nn.functional.cross_entropy(
        (users @ items[1:].T).reshape(-1, 7), targets.reshape(-1) - 1, ignore_index=-1
    )
    have = full_loss_reference(users, items, targets)
    assert have.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda u, i: full_loss_reference(u, i, targets), [users, items])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"targets: expected the shape of users without d"):
        full_loss(torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 2, dtype=torch.int64))
