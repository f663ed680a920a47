"""full_loss: softmax over the whole catalogue (SPEC, "Losses"): no correction, no mask but padding."""

from __future__ import annotations

import torch
from torch import Tensor


def full_loss_reference(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The definition, in plain torch, usable in float64.

    Args:
        users: `[..., d]`.
        items: `[I + 1, d]`; row 0 is padding and no candidate.
        targets: int64, the shape of `users` without d; 0 where a row has no target.

    Returns:
        The mean over rows with a target, a scalar; 0 where there is none.
    """
    users, targets = users.reshape(-1, users.shape[-1]), targets.reshape(-1)
    rows = targets != 0
    logits = users @ items[1:].T
    positive = logits.gather(1, (targets - 1).clamp_min(0)[:, None])[:, 0]
    loss = torch.logsumexp(logits, dim=1) - positive
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)
