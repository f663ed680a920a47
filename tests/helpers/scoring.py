"""Problems that the tests of losses and rankings share."""

from __future__ import annotations

import math

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


def no_numbers(dtype=torch.float32, items=120):
    """users, table, exclude and targets like these, with NaN and inf among users and items."""
    users, table, exclude, targets = whole_numbers(9, items)
    users[0], users[1, 2], users[2, 0], users[3] = math.nan, math.nan, math.inf, -math.inf
    table[5], table[6, 1], table[7, 0], table[8] = math.nan, math.nan, math.inf, -math.inf
    targets[4:8] = torch.tensor([5, 6, 7, 8])
    exclude[4, 0] = 6  # of which none stands ahead of the target
    exclude[5] = 5
    return users.to(dtype), table.to(dtype), exclude, targets


def scores_by_hand(users, table, exclude) -> list[dict[int, float]]:
    """A dict of every item's score for each user, in Python: −inf of what is excluded, or is no number."""
    found = []
    for user, banned in zip(users.tolist(), exclude.tolist(), strict=True):
        scores = {
            j: sum(a * b for a, b in zip(user, item, strict=True)) for j, item in enumerate(table.tolist())
        }
        gone = {j for j, score in scores.items() if j in banned or math.isnan(score)}
        found.append({j: -math.inf if j in gone else score for j, score in scores.items() if j})
    return found


def ranks_by_hand(users, table, targets, exclude) -> list[int]:
    return [
        1 + sum(score >= scores[target] for j, score in scores.items() if j != target)
        for scores, target in zip(scores_by_hand(users, table, exclude), targets.tolist(), strict=True)
    ]


def best_by_hand(users, table, k, exclude) -> list[list[int]]:
    """Ids of the k best, 0 where there are fewer."""
    found = []
    for scores in scores_by_hand(users, table, exclude):
        kept = sorted((-score, j) for j, score in scores.items() if score > -math.inf)[:k]
        found.append([j for _, j in kept] + [0] * (k - len(kept)))
    return found
