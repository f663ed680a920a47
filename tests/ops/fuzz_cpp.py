"""Random shapes, strides, types and ids through every compiled CPU op; .ci/sanitize runs it sanitized.

Right arguments must give results of the right shapes, wrong ones an exception; the sanitizers watch every
access.
"""

from __future__ import annotations

import os
import random
import sys

import torch
from torch import Tensor

from crossan_fast import _build
from crossan_fast.ops.side_network import SideNetworkStructure

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORED = (*FLOATS, torch.int8, torch.float8_e4m3fn)
REFUSED = (ValueError, TypeError, IndexError, RuntimeError)


def strided(tensor: Tensor) -> Tensor:
    """The same values, now and then as a view with gaps, a transposed one, or at an odd offset."""
    kind = random.randrange(4)
    if tensor.dim() == 0 or kind == 0:
        return tensor
    if kind == 1:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == 2 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[min(1, tensor.numel()) :].view(
        tensor.shape
    )


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    scale = random.choice([0.1, 1, 1, 50])
    return strided((torch.randn(shape) * scale).to(dtype))


def numbers(low: int, high: int, *shape: int) -> Tensor:
    """Ids in [low, high), and one in twenty times one far outside."""
    ids = torch.randint(low, max(high, low + 1), shape)
    if random.random() < 0.05 and ids.numel():
        ids.view(-1)[random.randrange(ids.numel())] = random.choice([-1, high, 2**40, -(2**63)])
    return strided(ids)


def side_network(ops) -> None:
    modalities = random.randint(1, 3)
    widths = tuple(random.choice([1, 3, 16, 33, 70]) for _ in range(modalities))
    sources: tuple[tuple[int, ...], ...] = tuple((m,) for m in range(modalities))
    if modalities > 1 and random.random() < 0.5:
        sources += ((0, 1), (1, 0))
    cross = random.choice(["none", "backbone", "side"])
    structure = SideNetworkStructure(widths, sources, cross, random.choice(["gelu", "relu"]))
    rows, levels, rank = random.randint(0, 9), random.randint(1, 3), random.choice([1, 5, 16, 64])
    dtype, stored = random.choice(FLOATS), random.choice(STORED)
    towers, wide = (
        structure.tower_widths,
        [max(widths[m] for m in sources[t]) for t in structure.narrowed_towers],
    )
    narrow = [towers[t] for t in structure.narrowed_towers]
    shapes = [(levels, rank, d) for d in towers] + [(levels, rank) for _ in towers]
    shapes += [(levels, d, rank) for d in towers] + [(levels, d) for d in towers]
    shapes += [(levels,)] * (len(towers) + len(structure.cross_pairs))
    shapes += [(rank, widths[n]) for _, n in structure.projected_pairs]
    shapes += [(widths[m], rank) for m, _ in structure.projected_pairs]
    shapes += [(levels, d, e) for d, e in zip(narrow, wide, strict=True)] + [(levels, d) for d in narrow]
    weights = [values(*shape, dtype=random.choice(FLOATS)) for shape in shapes]
    states = [values(rows, levels, d).to(stored) for d in widths]
    scales = [torch.rand(rows, levels) for _ in widths] if random.random() < 0.5 else []
    ids = numbers(0, rows, random.randint(0, 150)) if random.random() < 0.7 else None
    count = rows if ids is None else len(ids)
    present = torch.rand(count, modalities) > 0.3 if random.random() < 0.5 else None
    if random.random() < 0.05:
        weights[random.randrange(len(weights))] = values(2, 2)
    static = (*structure.static, dtype)
    out = ops.side_network(states, scales, ids, present, weights, *static)
    assert [tuple(o.shape) for o in out] == [(count, d) for d in towers] + [(count, levels, rank)] * len(
        towers
    )
    grads = [values(count, d, dtype=dtype) for d in towers]
    saved = [strided(z) for z in out[len(towers) :]]
    back = ops.side_network_backward(grads, saved, states, scales, ids, present, weights, *static)
    assert [g.shape for g in back] == [w.shape for w in weights]


def fusion(ops) -> None:
    count, width, expansion = random.choice([0, 1, 7, 130]), random.choice([1, 6, 64]), random.choice([1, 24])
    widths = [random.choice([1, 17, 64]) for _ in range(random.randint(1, 4))]
    m, dtype = len(widths), random.choice(FLOATS)
    shapes = [(width, d) for d in widths] + [(width,)] * m + [(m, m * width), (m,), (m, expansion, width)]
    shapes += [(m, expansion), (m, width, expansion), (m, width)]
    weights = [values(*shape) for shape in shapes]
    hidden = [values(count, d, dtype=dtype) for d in widths]
    present = torch.rand(count, m) > 0.3 if random.random() < 0.5 else None
    counts = torch.randint(0, 9, (count,)) if random.random() < 0.5 else None
    top_k = random.choice([None, 1, m, m + 1])
    items, _, probability, *saved = ops.fusion(hidden, weights, present, top_k, counts, dtype)
    arguments = (hidden, weights, present, top_k, counts, dtype)
    back = ops.fusion_backward(strided(items), probability, saved, *arguments)
    assert [g.shape for g in back] == [t.shape for t in (*hidden, *weights)]


def sequence_encoder(ops) -> None:
    heads, each = random.choice([1, 2, 3]), random.choice([1, 5, 16, 33])
    batch, places, width, inner = random.choice([0, 1, 7, 150]), random.randint(0, 12), heads * each, 24
    shapes = [(places + random.randint(0, 3), width), (width,), (width,)]
    block = (
        [(width, width)] * 4 + [(width,)] * 2 + [(inner, width), (inner,), (width, inner)] + [(width,)] * 3
    )
    shapes += block * random.randint(0, 2)
    weights = [values(*shape, dtype=random.choice(FLOATS)) for shape in shapes]
    if random.random() < 0.05:
        weights[random.randrange(len(weights))] = values(2, 2)
    items = values(batch, places, width, dtype=random.choice(FLOATS))
    mask, dtype = strided(torch.rand(batch, places) > random.choice([0, 0.4, 1])), random.choice(FLOATS)
    seed = torch.randint(-(2**63), 2**63 - 1, ()) if random.random() < 0.7 else None
    dropout = 0.0 if seed is None else random.choice([0.0, 0.3, 0.999999])
    arguments = (items, mask, weights, heads, 1e-6, dropout, seed)
    users, kept = ops.sequence_encoder(*arguments, random.random() < 0.8, dtype)
    if len(kept) == batch * places:
        back = ops.sequence_encoder_backward(strided(users), kept, *arguments, dtype)
        assert [g.shape for g in back] == [t.shape for t in (items, *weights)]


def losses(ops) -> None:
    batch, sequence, width = random.randint(0, 20), random.randint(0, 12), random.choice([1, 5, 64, 130])
    columns, dtype = random.choice([1, 4, 239, 241, 700]), random.choice(FLOATS)
    users, items = values(batch, sequence, width, dtype=dtype), values(columns, width, dtype=dtype)
    rest = (numbers(0, columns, batch, sequence + 1), torch.randint(0, 4, (columns,)), values(columns))
    loss, lse = ops.in_batch_loss(users, items, *rest)
    ops.in_batch_loss_backward(loss, lse, users, items, *rest)
    flat, targets = users.reshape(-1, width), numbers(0, columns, batch * sequence)
    loss, lse = ops.full_loss(flat, items, targets)
    ops.full_loss_backward(loss, lse, flat, items, targets)


def rankings(ops) -> None:
    batch, width = random.choice([0, 1, 5, 63, 65]), random.choice([1, 5, 64, 130])
    catalogue, dtype = random.choice([0, 1, 5, 96, 97, 8193]), random.choice(FLOATS)
    users, items = values(batch, width, dtype=dtype), values(catalogue + 1, width, dtype=dtype)
    if random.random() < 0.1 and batch:
        users[0, 0] = float("nan")
    exclude = numbers(0, catalogue + 1, batch, random.randint(0, 9)) if random.random() < 0.6 else None
    ops.topk_scores(users, items, random.choice([1, 3, 200]), exclude)
    ops.deduplicate(numbers(0, 50, batch, 3), random.choice([None, 51, 10]))
    ops.rank_of_target(users, items, numbers(1, catalogue + 1, batch), exclude)


def main(count: int, seed: int) -> None:
    _build.load("cpu")
    ops = torch.ops.crossan_fast_cpp
    random.seed(seed)
    torch.manual_seed(seed)
    print(f"{count} calls of seed {seed}", flush=True)
    ops_called = (side_network, fusion, losses, rankings, sequence_encoder)
    refused = 0
    ways = ["auto", "brgemm" if ops.has_brgemm() else "fp32"]
    for _ in range(count):
        torch.set_num_threads(random.choice([1, 2, 3]))
        # bf16 through brgemm too, which only CPUs with AMX choose by themselves.
        os.environ["CROSSAN_FAST_CPU_BF16"] = random.choice(ways)
        try:
            random.choice(ops_called)(ops)
        except REFUSED:
            refused += 1
    print(f"{refused} refused")
    if refused > count / 2:
        raise SystemExit("more than half of the runs were refused: the fuzz itself is wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
