"""Calls of the public ops with one argument made hostile: each is served, or refused by the argument's name.

A case is drawn from its seed alone, so that one that was lost can be had again.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tally import Tally
from torch import Tensor

from crossan_fast import ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN: list[Any] = [
    None,
    "text",
    b"bytes",
    3,
    0,
    -1,
    2**31,
    2**63,
    -(2**70),
    1.5,
    math.nan,
    math.inf,
    True,
    [],
    [1],
    (),
    {},
    object(),
    torch.float32,
    torch.int8,
    torch.complex64,
    torch.tensor(1.0),
    torch.tensor([1, 2]),
    torch.Size([2]),
]
IDS = (-1, 10**6, 2**31, 2**40, -(2**63), 2**63 - 1)

UNAVAILABLE = "what the backend does not serve"

# Errors of a caller's mistake; RuntimeError is for what a backend cannot serve.
REFUSALS = (TypeError, ValueError, IndexError, ops.BackendUnavailable)


def draw(op: str, rng: random.Random) -> dict[str, Any]:
    """Right arguments of a public op, by name."""
    return _DRAWS[op](rng)


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _batch_rows(rng: random.Random) -> dict[str, Any]:
    return {
        "embeddings": _floats(6, 4, dtype=rng.choice(FLOATS)),
        "slots": torch.tensor([[0, 1, 2, 3], [0, 0, 4, 5]]),
        "ids": torch.tensor([0, 1, 2, 5, 6, 7]),
        "popularity": torch.rand(8) + 0.1,
    }


def _deduplicate(rng: random.Random) -> dict[str, Any]:
    return {"item_ids": torch.randint(0, 9, (3, 4)), "capacity": rng.choice([None, 13])}


def _full_loss(rng: random.Random) -> dict[str, Any]:
    dtype = rng.choice(FLOATS)
    return {
        "users": _floats(3, 4, dtype=dtype),
        "items": _floats(6, 4, dtype=dtype),
        "targets": torch.arange(3),
    }


def _in_batch_loss(rng: random.Random) -> dict[str, Any]:
    dtype = rng.choice(FLOATS)
    return {
        "users": _floats(2, 3, 4, dtype=dtype),
        "items": _floats(6, 4, dtype=dtype),
        "slots": torch.tensor([[0, 1, 2, 3], [0, 0, 4, 5]]),
        "counts": torch.tensor([0, 1, 1, 1, 1, 2]),
        "log_popularity": -torch.rand(6),
    }


def _ranking(rng: random.Random) -> dict[str, Any]:
    dtype = rng.choice(FLOATS)
    exclude = rng.choice([None, torch.tensor([[0, 2], [3, 0], [1, 1]])])
    return {"users": _floats(3, 4, dtype=dtype), "items": _floats(9, 4, dtype=dtype), "exclude": exclude}


def _rank_of_target(rng: random.Random) -> dict[str, Any]:
    return {**_ranking(rng), "targets": torch.tensor([1, 8, 3])}


def _topk_scores(rng: random.Random) -> dict[str, Any]:
    return {**_ranking(rng), "k": rng.choice([1, 5, 30])}


def _gather_convert(rng: random.Random) -> dict[str, Any]:
    stored = rng.choice([*FLOATS, torch.int8, torch.float8_e4m3fn])
    return {
        "states": _floats(5, 2, 3).to(stored),
        "scales": torch.rand(5, 2) if stored in (torch.int8, torch.float8_e4m3fn) else None,
        "ids": rng.choice([None, torch.tensor([4, 0, 1])]),
        "dtype": rng.choice(FLOATS),
    }


def _fusion(rng: random.Random) -> dict[str, Any]:
    m, d, f, n = 3, 4, 5, 6
    shapes = [(m, m * d), (m,), (m, f, d), (m, f), (m, d, f), (m, d)]
    dtype = rng.choice(FLOATS)
    return {
        "embeddings": _floats(n, m, d, dtype=dtype),
        "weights": ops.FusionWeights(*(_floats(*shape, dtype=dtype) for shape in shapes)),
        "present": rng.choice([None, torch.ones(n, m, dtype=torch.bool)]),
        "top_k": rng.choice([None, 1, 2]),
        "counts": rng.choice([None, torch.arange(n)]),
    }


def _sequence_encoder(rng: random.Random) -> dict[str, Any]:
    d, inner, places = 4, 6, 3
    block = [(d, d)] * 4 + [(d,)] * 2 + [(inner, d), (inner,), (d, inner)] + [(d,)] * 3
    weights = ops.SequenceEncoderWeights(
        _floats(5, d), _floats(d), _floats(d), [ops.SequenceEncoderBlock(*(_floats(*s) for s in block))]
    )
    return {
        "items": _floats(2, places, d),
        "mask": torch.tensor([[False, True, True], [True, True, True]]),
        "weights": weights,
        "heads": rng.choice([1, 2]),
        "dropout": rng.choice([0.0, 0.3]),
        "seed": torch.tensor(5),
    }


def _side_network(rng: random.Random) -> dict[str, Any]:
    widths, levels, rank, d, rows = rng.choice([(4, 4), (4, 6)]), 2, 3, 5, 7
    cross = rng.choice(["none", "backbone", "side"])
    sources = ((0,), (1,), (0, 1)) if rng.random() < 0.3 else ((0,), (1,))
    structure = ops.SideNetworkStructure(widths, sources, cross)
    towers = structure.tower_widths
    narrow = [sorted(widths[m] for m in sources[t]) for t in structure.narrowed_towers]
    weights = ops.SideNetworkWeights(
        [_floats(levels, rank, w) for w in towers],
        [_floats(levels, rank) for _ in towers],
        [_floats(levels, w, rank) for w in towers],
        [_floats(levels, w) for w in towers],
        [_floats(levels) for _ in towers],
        [_floats(d, w) for w in towers],
        [_floats(d) for _ in towers],
        [_floats(levels) for _ in structure.cross_pairs],
        [_floats(rank, widths[n]) for _, n in structure.projected_pairs],
        [_floats(widths[m], rank) for m, _ in structure.projected_pairs],
        [_floats(levels, low, high) for low, high in narrow],
        [_floats(levels, low) for low, _ in narrow],
    )
    stored = rng.choice([*FLOATS, torch.int8, torch.float8_e4m3fn])
    coded = stored in (torch.int8, torch.float8_e4m3fn)
    ids = rng.choice([None, torch.tensor([6, 0, 3])])
    count = rows if ids is None else len(ids)
    return {
        "states": [_floats(rows, levels, w).to(stored) for w in widths],
        "weights": weights,
        "structure": structure,
        "ids": ids,
        "scales": [torch.rand(rows, levels) for _ in widths] if coded else None,
        "present": rng.choice([None, torch.ones(count, 2, dtype=torch.bool)]),
    }


_DRAWS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "batch_rows": _batch_rows,
    "deduplicate": _deduplicate,
    "full_loss": _full_loss,
    "fusion": _fusion,
    "gather_convert": _gather_convert,
    "in_batch_loss": _in_batch_loss,
    "rank_of_target": _rank_of_target,
    "sequence_encoder": _sequence_encoder,
    "side_network": _side_network,
    "topk_scores": _topk_scores,
}


def hostile(value: Any, rng: random.Random) -> Any:
    """Something else in the place of a right value: most often nearly right."""
    if rng.random() < 0.3:
        return rng.choice(PLAIN)
    if isinstance(value, Tensor):
        return _hostile_tensor(value, rng)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # weights
        name = rng.choice(value._fields)
        return value._replace(**{name: hostile(getattr(value, name), rng)})
    if isinstance(value, list) and value:
        copy, place = list(value), rng.randrange(len(value))
        copy[place] = hostile(copy[place], rng)
        return rng.choice([copy, copy, value[:-1], [*value, value[0]]])
    return rng.choice(PLAIN)


def _hostile_tensor(tensor: Tensor, rng: random.Random) -> Any:
    if not tensor.is_floating_point() and tensor.numel() and rng.random() < 0.5:
        bad = tensor.clone()
        bad.view(-1)[rng.randrange(bad.numel())] = rng.choice(IDS) if tensor.dtype == torch.int64 else 1
        return bad
    changes: list[Callable[[Tensor], Any]] = [
        lambda t: t.to(rng.choice([*FLOATS, torch.int64, torch.int32, torch.bool, torch.complex64])),
        lambda t: t[..., :-1] if t.dim() else t[None],
        lambda t: t[:0] if t.dim() else t[None],
        lambda t: t.unsqueeze(rng.randrange(t.dim() + 1)),
        lambda t: t[0] if t.dim() and len(t) else t,
        lambda t: t.sum() if t.dtype != torch.float8_e4m3fn else t.view(torch.int8),
        lambda t: t.to_sparse() if t.dtype in FLOATS[:2] and t.dim() else t.to("meta"),
        lambda t: t.to("meta"),
        lambda t: (
            torch.full_like(t, rng.choice([math.nan, math.inf, -math.inf, 6e4])) if t.dtype in FLOATS else t
        ),
        lambda t: t.detach().requires_grad_() if t.dtype in FLOATS else t,
        lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
        lambda t: t.numpy() if t.dtype in FLOATS[:2] else t.tolist(),
        lambda t: torch.cat([t, t]) if t.dim() else t,
    ]
    return rng.choice(changes)(tensor)


def names_of(op: str) -> set[str]:
    """Every name that a refusal may begin with: parameters, and the fields of weights."""
    names = set(inspect.signature(getattr(ops, op)).parameters)
    for kind in (ops.FusionWeights, ops.SideNetworkWeights, ops.SequenceEncoderWeights):
        names |= set(kind._fields)
    return names


def case(op: str, seed: str) -> tuple[dict[str, Any], str]:
    """The arguments of a case, one of them hostile, and its name."""
    rng = random.Random(seed)
    torch.manual_seed(rng.randrange(2**31))
    arguments = draw(op, rng)
    name = rng.choice(list(arguments))
    arguments[name] = hostile(arguments[name], rng)
    return arguments, name


def judge(op: str, arguments: dict[str, Any], backend: str) -> tuple[str | None, str]:
    """How the case was lost, or None; and what came, in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = getattr(ops, op)(**arguments, backend=backend)
    except REFUSALS as error:
        text = str(error)
        named = re.match(r"\w+", text)
        if isinstance(error, ops.BackendUnavailable):
            return None, UNAVAILABLE
        if named and named[0] in names_of(op):
            return None, "refused"
        return "unnamed", f"{type(error).__name__}: {text[:120]}"
    except Exception as error:
        return "unnamed", f"{type(error).__name__}: {str(error)[:120]}"
    outputs = result if isinstance(result, tuple) else (result,)
    return None, "served " + ", ".join(f"{t.dtype} {list(t.shape)}" for t in outputs)


def attack(backend: str, seed: int, first: int, count: int, every: Callable[[int], None]) -> Tally:
    """`count` cases from case `first` on, over all ops that the backend has; `every` hears of each before it.

    A case that the reference refuses must be refused here, and one that it serves have its shapes and types.
    """
    tally = Tally(f"calls with a hostile argument, {backend}")
    served = [op for op in _DRAWS if ops.has_kernel(op, backend)]
    for index in range(first, first + count):
        every(index)
        op = served[index % len(served)]
        name = f"{op}:{seed}:{index}"
        arguments, changed = case(op, name)
        how, what = judge(op, arguments, backend)
        if how is None and backend != "eager" and what != UNAVAILABLE:
            other, expected = judge(op, case(op, name)[0], "eager")
            if other is None and expected != what:
                how, what = "unlike eager", f"{what}, but eager {expected}"
        tally.add(how, f"{name} ({changed}): {what}")
    return tally
