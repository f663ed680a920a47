"""in_batch_loss: IISAN's debiased in-batch softmax, exact over the batch's distinct ids (SPEC, "Losses").

Row (b, s) with a real item at s predicts item[b, s+1]. With logit = ⟨user, item⟩ − log pop(item), U the
batch's distinct ids and n_u their counts,

    loss = −s_t + log( exp(s_t) + Σ_{u ∈ U, u ∉ sequence b} n_u · exp(s_u) ),        mean over rows

which is the cross entropy over every non-padding place of the batch, those masked whose id occurs in row b's
own sequence except the target's place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_batch_loss_reference(
    users: Tensor, items: Tensor, slots: Tensor, counts: Tensor, log_popularity: Tensor
) -> Tensor:
    """The definition over distinct ids, in plain torch, usable in float64.

    Args:
        users: `[B, S, d]`.
        items: `[U, d]`, row 0 padding.
        slots: int64 `[B, S+1]`, the row of `items` at each place, 0 at padding.
        counts: int64 `[U]`; 0 takes a row out of every sum.
        log_popularity: `[U]`, log of each item's share of the training interactions.

    Returns:
        The mean over rows with a target, a scalar; 0 where there is none.
    """
    logits = users @ items.T - log_popularity.to(users.dtype)
    target = slots[:, 1:]
    rows = (slots[:, :-1] != 0) & (target != 0)
    own = torch.zeros(slots.shape[0], items.shape[0], dtype=torch.bool, device=slots.device)
    own.scatter_(1, slots, True)
    negative = (logits + torch.log(counts.to(logits.dtype))).masked_fill(own[:, None, :], float("-inf"))
    positive = logits.gather(2, target[:, :, None])
    loss = torch.logsumexp(torch.cat([positive, negative], dim=2), dim=2) - positive[:, :, 0]
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)


def in_batch_loss_by_place(users: Tensor, items: Tensor, item_ids: Tensor, log_popularity: Tensor) -> Tensor:
    """The same loss with a column for every place of the batch, as IISAN states it.

    Args:
        users: `[B, S, d]`.
        items: `[B, S+1, d]`.
        item_ids: `[B, S+1]`, 0 at padding.
        log_popularity: `[B, S+1]`.
    """
    batch, places = item_ids.shape
    flat = item_ids.reshape(-1)
    logits = users @ items.reshape(batch * places, -1).T - log_popularity.reshape(-1).to(users.dtype)
    own = (item_ids[:, :, None] == flat).any(dim=1)
    blocked = (own | (flat == 0))[:, None, :].repeat(1, places - 1, 1)
    place = torch.arange(batch * places, device=item_ids.device).reshape(batch, places)[:, 1:]
    blocked.scatter_(2, place[:, :, None], False)
    rows = (item_ids[:, :-1] != 0) & (item_ids[:, 1:] != 0)
    logits = logits.masked_fill(blocked, float("-inf"))
    loss = torch.logsumexp(logits, dim=2) - logits.gather(2, place[:, :, None])[:, :, 0]
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)
