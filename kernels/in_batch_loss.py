"""in_batch_loss in Triton: the debiased in-batch softmax over distinct ids, see `_streaming_softmax`."""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast.kernels import _streaming_loss
from crossan_fast.kernels._streaming_loss import Problem


def _problem(users: Tensor, items: Tensor, slots: Tensor, counts: Tensor, log_popularity: Tensor) -> Problem:
    return Problem.of(users, items, slots, counts, log_popularity.to(torch.float32))


def forward(
    users: Tensor, items: Tensor, slots: Tensor, counts: Tensor, log_popularity: Tensor
) -> tuple[Tensor, Tensor]:
    """See `in_batch_loss_reference` for the arguments; it computes in the items' type.

    Returns:
        (the loss, fp32; log-sum-exp of each row `[B, S]`, fp32, +inf where a row has no target).
    """
    loss, lse = _streaming_loss.forward(_problem(users, items, slots, counts, log_popularity))
    return loss, lse.view(users.shape[:2])


def backward(
    grad_loss: Tensor,
    lse: Tensor,
    users: Tensor,
    items: Tensor,
    slots: Tensor,
    counts: Tensor,
    log_popularity: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `users` and `items`, each in its own dtype; `lse` is the forward's."""
    problem = _problem(users, items, slots, counts, log_popularity)
    grad_users, grad_items = _streaming_loss.backward(grad_loss, lse.contiguous(), problem)
    return grad_users.view(users.shape).to(users.dtype), grad_items
