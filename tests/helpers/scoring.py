"""Problems that the tests of losses and rankings share."""

from __future__ import annotations

import torch
from compiled_ops import random
from torch import Tensor

from crossan_fast.ops.deduplicate import deduplicate_reference


def batch(size: int, sequence: int, catalogue: int, width: int, seed: int = 0):
    """users, items, slots, counts, log_popularity and ids of a left-padded batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, catalogue, (size, sequence + 1), generator=generator)
    lengths = torch.randint(0, sequence + 2, (size, 1), generator=generator)
    ids[torch.arange(sequence + 1) < sequence + 1 - lengths] = 0
    distinct, slots, counts = deduplicate_reference(ids)
    users = random(size, sequence, width, seed=seed + 1)
    items = random(len(distinct), width, seed=seed + 2)
    log_popularity = torch.log(torch.rand(len(distinct), generator=generator, dtype=torch.float64) + 0.01)
    return users, items, slots, counts, log_popularity, ids


def loss_and_grads(loss, users, items, *rest, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    users, items = users.detach().requires_grad_(), items.detach().requires_grad_()
    value = loss(users, items, *rest, **kwargs)
    return value.detach(), *torch.autograd.grad(value * 1.7, (users, items))


def ranking(batch_size: int, catalogue: int, width: int, history: int, dtype: torch.dtype):
    """Whole numbers, on which scores are exact in any order and tie often."""
    generator = torch.Generator().manual_seed(catalogue)
    users = torch.randint(-3, 4, (batch_size, width), generator=generator).to(dtype)
    items = torch.randint(-3, 4, (catalogue + 1, width), generator=generator).to(dtype)
    targets = torch.randint(1, catalogue + 1, (batch_size,), generator=generator)
    exclude = torch.randint(-1, catalogue + 3, (batch_size, history), generator=generator)
    return users, items, targets, exclude


RANKINGS = [(1, 5, 3, 2), (70, 333, 7, 9), (130, 9000, 5, 0), (3, 20000, 64, 30), (0, 4, 2, 1), (5, 1, 2, 3)]


def whole_numbers(batch=6, items=40, d=3, history=5):
    """users, table, exclude and targets of whole numbers, on which every comparison is exact."""
    users = torch.randint(-2, 3, (batch, d)).float()
    table = torch.randint(-2, 3, (items + 1, d)).float()
    exclude = torch.randint(0, items + 1, (batch, history))
    targets = torch.randint(1, items + 1, (batch,))
    return users, table, exclude, targets
