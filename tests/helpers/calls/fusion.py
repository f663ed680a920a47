"""fusion: modalities, presence, counts, top-k (one too many, too)."""

from __future__ import annotations

import random

import torch

from calls import FLOATS, strided, values


def draw():
    count, width, expansion = random.choice([0, 1, 7, 130]), random.choice([1, 6, 64]), random.choice([1, 24])
    m, dtype = random.randint(1, 4), random.choice(FLOATS)
    shapes = [(m, m * width), (m,), (m, expansion, width), (m, expansion), (m, width, expansion), (m, width)]
    weights = [values(*shape) for shape in shapes]
    if random.random() < 0.05:
        weights[random.randrange(len(weights))] = values(2, 2)
    embeddings = values(count, m, width, dtype=random.choice(FLOATS))
    present = torch.rand(count, m) > 0.3 if random.random() < 0.5 else None
    counts = torch.randint(0, 9, (count,)) if random.random() < 0.5 else None
    return embeddings, weights, present, random.choice([None, 1, m, m + 1]), counts, dtype


def follow(library, arguments, results):
    embeddings, weights, *_ = arguments
    items, _, probability, logits = results
    count, m, width = embeddings.shape
    assert [tuple(o.shape) for o in results] == [(count, width), (m,), (m,), (count, m)]
    back = library.fusion_backward(strided(items), probability, strided(logits), *arguments)
    assert [g.shape for g in back] == [t.shape for t in (embeddings, *weights)]
