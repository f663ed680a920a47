"""In-batch negatives from every process, so that N processes compute the loss of one on the joined batch.

Each process encodes its own batch's distinct items; their ids, counts and embeddings are gathered, an item
that several hold being taken from the first of them. `DistributedDataParallel` averages gradients
over processes, so losses times `row_share` give the gradient of the joined batch's mean loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossan_fast import ops
from crossan_fast.ops.deduplicate import first_places


def row_share(item_ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's rows with a target × processes / everyone's, a scalar; every process must call it."""
    rows = ((item_ids[:, :-1] != 0) & (item_ids[:, 1:] != 0)).sum()
    everyone = rows.clone()
    dist.all_reduce(everyone, group=group)
    return rows * dist.get_world_size(group) / everyone.clamp_min(1)


def gather_negatives(
    unique: ops.Deduplicated,
    embeddings: Tensor,
    group: dist.ProcessGroup,
    *,
    equal: bool = False,
    backend: str = "auto",
) -> tuple[ops.Deduplicated, Tensor]:
    """Join the batches of all processes of `group`; every process must call it.

    Args:
        unique: distinct ids of this process's batch; batches may differ in size.
        embeddings: `[U, d]`, their embeddings.
        equal: every process has as many slots; then nothing waits for the device.
        backend: of `ops.deduplicate`.

    Returns:
        The joined batch's distinct ids and counts, with the slots of this process's places among them; and
        the embeddings, differentiable with respect to every process's own.
    """
    size = dist.get_world_size(group)
    missing = 0
    if not equal:
        width = torch.tensor(unique.ids.numel(), device=unique.ids.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
        missing = int(width) - unique.ids.numel()
    # Ids and counts of all processes, one row each; padding (id 0, count 0) fills up.
    mine = torch.nn.functional.pad(torch.stack([unique.ids, unique.counts]), (0, missing))
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    ids, counts = torch.stack(gathered).unbind(1)
    padded = torch.nn.functional.pad(embeddings, (0, 0, 0, missing))
    everyone = _AllGather.apply(padded, group).flatten(0, 1)
    joined = ops.deduplicate(ids, ids.numel() + 1 if equal else None, backend=backend)
    total = counts.new_zeros(joined.ids.shape).scatter_add_(0, joined.slots.flatten(), counts.flatten())
    # The first place of each joined id among the gathered: every process picks the same.
    first = first_places(joined.slots, len(joined.ids))
    mine_joined = joined.slots[dist.get_rank(group)]
    return ops.Deduplicated(joined.ids, mine_joined[unique.slots], total), everyone[first]


class _AllGather(torch.autograd.Function):
    """`[n, d]` of every process → `[processes, n, d]`; backward sums what all processes say of one's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        # A sum of everything, then one's own part: gloo has no reduce-scatter on every version.
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
