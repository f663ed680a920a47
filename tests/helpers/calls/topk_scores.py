"""topk_scores: any catalogue, also of padding alone, NaN among the users, excluded ids."""

from __future__ import annotations

import random

from calls import FLOATS, numbers, values


def draw():
    batch, width = random.choice([0, 1, 5, 63, 65]), random.choice([1, 5, 64, 130])
    catalogue, dtype = random.choice([0, 1, 5, 96, 97, 8193]), random.choice(FLOATS)
    users, items = values(batch, width, dtype=dtype), values(catalogue + 1, width, dtype=dtype)
    if random.random() < 0.1 and batch:
        users[0, 0] = float("nan")
    exclude = numbers(0, catalogue + 1, batch, random.randint(0, 9)) if random.random() < 0.6 else None
    return users, items, random.choice([1, 3, 200]), exclude


def follow(library, arguments, results):
    assert results[0].shape == results[1].shape == (len(arguments[0]), arguments[2])
