"""full_loss: any number of rows and items, also across a tile's edge."""

from __future__ import annotations

import random

from calls import FLOATS, numbers, values


def draw():
    rows, width = random.choice([0, 1, 7, 240]), random.choice([1, 5, 64, 130])
    columns, dtype = random.choice([1, 4, 239, 241, 700]), random.choice(FLOATS)
    return values(rows, width, dtype=dtype), values(columns, width, dtype=dtype), numbers(0, columns, rows)


def follow(library, arguments, results):
    loss, lse = results
    users, items = library.full_loss_backward(loss, lse, *arguments)
    assert users.shape == arguments[0].shape and items.shape == arguments[1].shape
