"""side_network: modalities of any width, pair towers, each cross, any stored type, ids, presence."""

from __future__ import annotations

import random

import torch

from calls import FLOATS, STORED, numbers, strided, values
from crossan_fast.ops import SideNetworkStructure
from crossan_fast.ops.side_network import links_size


def draw():
    modalities = random.randint(1, 3)
    widths = tuple(random.choice([1, 3, 16, 33, 70]) for _ in range(modalities))
    sources: tuple[tuple[int, ...], ...] = tuple((m,) for m in range(modalities))
    if modalities > 1 and random.random() < 0.5:
        sources += ((0, 1), (1, 0))
    cross = random.choice(["none", "backbone", "side"])
    activation, projection = random.choice(["gelu", "relu"]), random.choice(["identity", "low_rank"])
    structure = SideNetworkStructure(widths, sources, cross, activation, cross_projection=projection)
    rows, levels, rank = random.randint(0, 9), random.randint(1, 4), random.choice([1, 5, 16, 64])
    shapes = _shapes(structure, levels, rank, random.choice([1, 7, 32, 64]))
    weights = [values(*shape, dtype=random.choice(FLOATS)) for shape in shapes]
    if random.random() < 0.05:
        weights[random.randrange(len(weights))] = values(2, 2)
    states = [values(rows, levels, d).to(random.choice(STORED)) for d in widths]
    quantized = any(state.dtype in STORED[-2:] for state in states)
    scales = [torch.rand(rows, levels) for _ in widths] if quantized or random.random() < 0.5 else []
    ids = numbers(0, rows, random.randint(0, 150)) if random.random() < 0.7 else None
    count = rows if ids is None else len(ids)
    present = torch.rand(count, modalities) > 0.3 if random.random() < 0.5 else None
    return states, scales, ids, present, weights, *structure.static, random.choice(FLOATS)


def follow(library, arguments, results):
    states, _, ids, _, weights, *static, dtype = arguments
    count, towers = len(states[0]) if ids is None else len(ids), len(static[1]) // 2
    levels, rank, _ = weights[0].shape
    embedding = len(weights[6 * towers])
    structure = SideNetworkStructure.from_static(*static)
    size = links_size(structure, levels, rank, embedding, weights[0].device)
    shapes = [(count, towers, embedding), (towers, count, levels, rank), (towers, size)]
    assert [tuple(o.shape) for o in results] == shapes
    grad = values(*shapes[0], dtype=dtype)
    back = library.side_network_backward(grad, *map(strided, results[1:]), *arguments)
    assert [g.shape for g in back] == [w.shape for w in weights]


def _shapes(structure, levels, rank, embedding):
    """In the order of `SideNetworkWeights.flatten`."""
    towers, widths = structure.tower_widths, structure.widths
    wide = [max(widths[m] for m in structure.sources[t]) for t in structure.narrowed_towers]
    narrow = [towers[t] for t in structure.narrowed_towers]
    shapes = [(levels, rank, d) for d in towers] + [(levels, rank) for _ in towers]
    shapes += [(levels, d, rank) for d in towers] + [(levels, d) for d in towers]
    shapes += [(levels,)] * len(towers) + [(embedding, d) for d in towers] + [(embedding,)] * len(towers)
    shapes += [(levels,)] * len(structure.cross_pairs)
    shapes += [(rank, widths[n]) for _, n in structure.projected_pairs]
    shapes += [(widths[m], rank) for m, _ in structure.projected_pairs]
    return [
        *shapes,
        *((levels, d, e) for d, e in zip(narrow, wide, strict=True)),
        *((levels, d) for d in narrow),
    ]
