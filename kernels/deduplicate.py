"""deduplicate on the GPU without waiting for it: one sort, one scan, three scatters.

Plain torch: the sort takes nearly all the time, and torch's is a tuned radix sort that Triton cannot match.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(item_ids: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids `[capacity]`, slots, counts `[capacity]`), see `Deduplicated`.

    Ids beyond the first `capacity` − 1 distinct ones cannot raise here, which would mean waiting for the
    device; their places become padding.
    """
    flat = item_ids.reshape(-1).to(torch.int64)
    ordered, order = torch.sort(torch.cat([flat.new_zeros(1), flat]))
    slot = torch.cat([flat.new_zeros(1), (ordered[1:] != ordered[:-1]).to(torch.int64)]).cumsum(0)
    # One slot more than there are takes the writes of ids that do not fit.
    kept = slot.clamp_max(capacity)
    ids = flat.new_zeros(capacity + 1).scatter_(0, kept, ordered)
    counts = flat.new_zeros(capacity + 1).scatter_add_(0, kept, torch.ones_like(kept))
    slots = torch.zeros_like(slot).scatter_(0, order, torch.where(slot < capacity, slot, 0))
    counts[0].zero_()
    return ids[:capacity].clone(), slots[1:].reshape(item_ids.shape).clone(), counts[:capacity].clone()
