"""full_loss in Triton: softmax over the whole catalogue, see `_streaming_softmax`."""

from __future__ import annotations

from torch import Tensor

from crossan_fast.kernels import _streaming_loss
from crossan_fast.kernels._streaming_loss import Problem


def forward(users: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        users: `[R, d]`, of the items' type, in which it computes, or a wider one.
        items: `[I + 1, d]`; row 0 is padding and no candidate.
        targets: int64 `[R]`, 0 where a row has no target.

    Returns:
        (the loss, fp32; log-sum-exp of each row `[R]`, fp32, +inf where a row has no target).
    """
    return _streaming_loss.forward(Problem.of(users, items, targets))


def backward(
    grad_loss: Tensor, lse: Tensor, users: Tensor, items: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `users` and `items`, each in its own dtype; `lse` is the forward's."""
    problem = Problem.of(users, items, targets)
    grad_users, grad_items = _streaming_loss.backward(grad_loss, lse.contiguous(), problem)
    return grad_users.to(users.dtype), grad_items
