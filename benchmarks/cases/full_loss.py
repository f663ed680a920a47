"""full_loss, rows × the catalogue from a batch of 64 users to one of 4,096."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases._shared import LOSS_BATCHES, PART_ELEMENTS, WIDTH, WINDOW, loss_operator, matmul_floors
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import Part
from benchmarks.registry import Case, Setting, Unavailable, Workload, register
from crossan_fast.ops import full_loss


def build(users: int, setting: Setting) -> Workload:
    device, generator = setting.device, setting.generator(f"full_loss/{users}")
    rows = users * WINDOW
    floors = matmul_floors(rows, CATALOGUE, setting.dtype.itemsize)

    def one_set() -> list[Tensor]:
        return [
            torch.randn(rows, WIDTH, device=device, generator=generator).to(setting.dtype),
            torch.randn(CATALOGUE + 1, WIDTH, device=device, generator=generator).to(setting.dtype),
            torch.randint(1, CATALOGUE + 1, (rows,), device=device, generator=generator),
        ]

    def call(_: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        return [full_loss(*inputs, backend=backend)]

    def split(inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Iterator[Part]:
        u, items, targets = inputs
        step = max(1, PART_ELEMENTS // CATALOGUE)
        for start in range(0, rows, step):
            cut = slice(start, start + step)
            yield Part([u[cut], items, targets[cut]], cotangents, weight=targets[cut].numel() / rows)

    peers = {"liger": _liger, "cce": _cce}
    return loss_operator(setting, one_set, call, floors, split, peers).workload(
        notes=["liger and cce express this loss; the in-batch one, with a mask and count a row, they can't"]
    )


def _liger(_: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Liger-Kernel's fused linear cross entropy over the catalogue's rows 1 … I."""
    users, items, targets = inputs
    function = _peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", users)
    return [function(users, items[1:], targets - 1)]


def _cce(_: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Cut Cross-Entropy's linear cross entropy over the same."""
    users, items, targets = inputs
    function = _peer("cut_cross_entropy", "linear_cross_entropy", users)
    return [function(users, items[1:], targets - 1)]


def _peer(module: str, name: str, users: Tensor) -> Callable[..., Tensor]:
    if users.device.type != "cuda":
        raise Unavailable(f"{module} runs on CUDA devices only")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Unavailable(f"{module} is not installed: {error}") from error


for batch, importance in LOSS_BATCHES:
    register(
        Case(
            name=f"full_loss/rows={batch * WINDOW},columns={CATALOGUE},d={WIDTH}",
            build=partial(build, batch),
            tags=frozenset({"batch", "loss"} | ({"paper"} if batch in (64, 1_024) else set())),
            importance=importance + 2,
            compiled=batch == 64,
            reference_bytes=4.0 * 4 * batch * WINDOW * CATALOGUE,
        )
    )
