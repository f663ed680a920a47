"""deduplicate: any batch, with and without a capacity, which may be too small."""

from __future__ import annotations

import random

from calls import numbers


def draw():
    return numbers(0, 50, random.choice([0, 1, 5, 63]), 3), random.choice([None, 51, 10])


def follow(library, arguments, results):
    ids, slots, counts = results
    assert slots.shape == arguments[0].shape and ids.shape == counts.shape
    assert arguments[1] is None or len(ids) == arguments[1]
