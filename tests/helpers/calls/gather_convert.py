"""gather_convert: any stored type, with and without scales and ids."""

from __future__ import annotations

import random

import torch

from calls import STORED, numbers, values


def draw():
    rows, levels, width = random.randint(0, 9), random.randint(1, 3), random.choice([1, 5, 8, 72])
    stored = random.choice(STORED)
    scales = torch.rand(rows, levels) if stored in STORED[-2:] else None
    ids = numbers(0, rows, random.randint(0, 20)) if random.random() < 0.7 else None
    return values(rows, levels, width).to(stored), scales, ids, random.choice(STORED[:4])


def follow(library, arguments, results):
    states, _, ids, dtype = arguments
    assert results.shape == (len(states) if ids is None else len(ids), *states.shape[1:])
    assert results.dtype == dtype
