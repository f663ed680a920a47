"""fusion: modalities of any width, presence, counts, top-k (one too many, too)."""

from __future__ import annotations

import random

import torch

from calls import FLOATS, strided, values


def draw():
    count, width, expansion = random.choice([0, 1, 7, 130]), random.choice([1, 6, 64]), random.choice([1, 24])
    widths = [random.choice([1, 17, 64]) for _ in range(random.randint(1, 4))]
    m, dtype = len(widths), random.choice(FLOATS)
    shapes = [(width, d) for d in widths] + [(width,)] * m + [(m, m * width), (m,), (m, expansion, width)]
    shapes += [(m, expansion), (m, width, expansion), (m, width)]
    weights = [values(*shape) for shape in shapes]
    hidden = [values(count, d, dtype=dtype) for d in widths]
    present = torch.rand(count, m) > 0.3 if random.random() < 0.5 else None
    counts = torch.randint(0, 9, (count,)) if random.random() < 0.5 else None
    return hidden, weights, present, random.choice([None, 1, m, m + 1]), counts, dtype


def follow(library, arguments, results):
    hidden, weights, *_ = arguments
    items, _, probability, *saved = results
    back = library.fusion_backward(strided(items), probability, saved, *arguments)
    assert [g.shape for g in back] == [t.shape for t in (*hidden, *weights)]
