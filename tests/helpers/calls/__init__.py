"""Calls of an op at random: what the fuzz and the registration's tests make of every op, found by its name.

A module `calls.<op>` offers `draw()`, the arguments of the op's schema without the backend, right but now and
then; and `follow(library, arguments, results)`, which checks what came and calls the backward of an op that
has one.
"""

from __future__ import annotations

import importlib
import random
from types import ModuleType

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORED = (*FLOATS, torch.int8, torch.float8_e4m3fn)


def of(op: str) -> ModuleType:
    """The module of an op's calls; ModuleNotFoundError names it where an op came without."""
    return importlib.import_module(f"calls.{op}")


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
