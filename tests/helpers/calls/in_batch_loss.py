"""in_batch_loss: any batch, any number of columns, also across a tile's edge."""

from __future__ import annotations

import random

import torch

from calls import FLOATS, numbers, values


def draw():
    batch, sequence, width = random.randint(0, 20), random.randint(0, 12), random.choice([1, 5, 64, 130])
    columns, dtype = random.choice([1, 4, 239, 241, 700]), random.choice(FLOATS)
    users, items = values(batch, sequence, width, dtype=dtype), values(columns, width, dtype=dtype)
    slots, counts = numbers(0, columns, batch, sequence + 1), torch.randint(0, 4, (columns,))
    return users, items, slots, counts, values(columns)


def follow(library, arguments, results):
    loss, lse = results
    users, items = library.in_batch_loss_backward(loss, lse, *arguments)
    assert users.shape == arguments[0].shape and items.shape == arguments[1].shape
