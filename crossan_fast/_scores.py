"""What a score is: the vectors that are multiplied, and label smoothing of the losses, in plain torch.

Backends see inner products alone: with `scores="cosine"` the vectors are unit vectors before they get them,
and a user's is divided by the temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast import ops
from crossan_fast.config import CrossanConfig
from crossan_fast.modules.id_embedding import rows_of


def as_items(config: CrossanConfig, items: Tensor) -> Tensor:
    """Item embeddings `[…, d]` as everything after the fusion has them."""
    return _unit(items) if config.scores == "cosine" else items


def as_users(config: CrossanConfig, users: Tensor) -> Tensor:
    """User vectors `[…, d]` whose inner product with an item is the score."""
    users = _unit(users) if config.scores == "cosine" else users
    return users if config.temperature == 1 else users / config.temperature


def _unit(vectors: Tensor) -> Tensor:
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return F.normalize(vectors.to(wide), dim=-1).to(vectors.dtype)


def smooth_in_batch(
    loss: Tensor,
    epsilon: float,
    users: Tensor,
    items: Tensor,
    unique: ops.Deduplicated,
    log_popularity: Tensor,
) -> Tensor:
    """The in-batch loss with label smoothing over a row's columns: (1 − ε) · loss + ε · mean(lse − s).

    That differs from the loss by ε · (s_t − mean s), and a mean of scores is one of vectors: nothing of the
    size of the logits is made. Arguments as `ops.in_batch_loss`.
    """
    if not epsilon:
        return loss
    wide = torch.promote_types(users.dtype, torch.float32)
    users, items, bias = users.to(wide), items.to(wide), log_popularity.to(wide)
    slots, counts = unique.slots, unique.counts.to(wide)
    placed, placed_bias = rows_of(items, slots), bias[slots]
    again = (slots[:, :, None] == slots[:, None, :]).tril(-1).any(2)
    own = torch.where(again | (slots == 0), 0, counts[slots])  # [B, S + 1]: of a row's own items, each once
    # Sums, not products, which autocast would compute in 16 bits.
    vector = (counts[:, None] * items).sum(0) - (own[:, :, None] * placed).sum(1)
    offset = (counts * bias).sum() - (own * placed_bias).sum(1)
    positive = (users * placed[:, 1:]).sum(-1) - placed_bias[:, 1:]
    negative = (users * vector[:, None]).sum(-1) - offset[:, None]
    mean = (positive + negative) / (1 + counts.sum() - own.sum(1))[:, None]
    rows = (slots[:, :-1] != 0) & (slots[:, 1:] != 0)
    return loss + epsilon * _mean(positive - mean, rows)


def smooth_full(loss: Tensor, epsilon: float, users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The same of the full loss, over all items but padding; arguments as `ops.full_loss`."""
    if not epsilon:
        return loss
    wide = torch.promote_types(users.dtype, torch.float32)
    users, items = users.to(wide), items.to(wide)
    excess = (users * (rows_of(items, targets) - items[1:].mean(0))).sum(-1)
    return loss + epsilon * _mean(excess, targets != 0)


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values, 0).sum() / rows.sum().clamp_min(1)
