"""sequence_encoder: any batch, window, heads and blocks, with and without dropout, kept or not."""

from __future__ import annotations

import random

import torch

from calls import FLOATS, strided, values


def draw():
    heads, each = random.choice([1, 2, 3]), random.choice([1, 5, 16, 33])
    batch, places, width, inner = random.choice([0, 1, 7, 150]), random.randint(0, 12), heads * each, 24
    shapes = [(places + random.randint(0, 3), width), (width,), (width,)]
    block = [(width, width)] * 4 + [(width,)] * 2 + [(inner, width), (inner,), (width, inner)]
    shapes += (block + [(width,)] * 3) * random.randint(0, 2)
    weights = [values(*shape, dtype=random.choice(FLOATS)) for shape in shapes]
    if random.random() < 0.05:
        weights[random.randrange(len(weights))] = values(2, 2)
    items = values(batch, places, width, dtype=random.choice(FLOATS))
    mask, dtype = strided(torch.rand(batch, places) > random.choice([0, 0.4, 1])), random.choice(FLOATS)
    seed = torch.randint(-(2**63), 2**63 - 1, ()) if random.random() < 0.7 else None
    dropout = 0.0 if seed is None else random.choice([0.0, 0.3, 0.999999])
    return items, mask, weights, heads, 1e-6, dropout, seed, random.random() < 0.8, dtype


def follow(library, arguments, results):
    *inputs, keep, dtype = arguments
    items, mask, weights, *_ = inputs
    users, kept = results
    if keep and len(kept) == mask.numel():
        back = library.sequence_encoder_backward(strided(users), kept, *inputs, dtype)
        assert [g.shape for g in back] == [t.shape for t in (items, *weights)]
