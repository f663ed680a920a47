"""What the machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.registry import Floor


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy: bytes a second, read and written together, of a copy too large for any cache.
    matmul: FLOP a second of a large square matrix product, by dtype.
    """

    copy: float
    matmul: float

    def milliseconds(self, floor: Floor) -> float:
        """The least time for a pass: it is bound by bytes or by arithmetic, whichever takes longer."""
        return 1e3 * max(floor.bytes / self.copy, floor.flops / self.matmul)


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured once a process for each device and dtype."""
    return Ceilings(_copy(device), _matmul(device, dtype))


@functools.cache
def _copy(device: torch.device) -> float:
    # fp32 elements: 1 GiB on a GPU; 512 MiB on a CPU, past the last-level cache of most.
    elements = (1 << 28) if device.type == "cuda" else (1 << 27)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    best = min(timing.sample(lambda: target.copy_(source), device, count=10))
    return 2 * 4 * elements / best


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = min(timing.sample(lambda: torch.mm(a, b, out=out), device, count=12))
    return 2 * size**3 / best
