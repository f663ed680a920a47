"""in_batch_loss and full_loss, rows × columns from a batch of 64 users to one of 4,096."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import Operator, Part, set_count
from benchmarks.registry import Case, Floor, Setting, Unavailable, Workload, register
from crossan_fast.ops import deduplicate, full_loss, in_batch_loss

WINDOW, WIDTH = 10, 64
PART_ELEMENTS = 2**25  # logits of a piece of the float64 reference: 256 MB


def random_sequences(
    users: int, catalogue: int, device: torch.device, generator: torch.Generator, window: int = WINDOW
) -> Tensor:
    """Item ids `[B, S + 1]` left-padded with 0: lengths 3 … S + 1, popularity falling with the id's rank."""
    uniform = torch.rand(users, window + 1, device=device, generator=generator)
    # Density ∝ 1/√id: the most popular tenth of the items gets a third of the places.
    ids = (uniform.square() * catalogue).to(torch.int64).clamp_max(catalogue - 1) + 1
    lengths = torch.randint(3, window + 2, (users, 1), device=device, generator=generator)
    return torch.where(torch.arange(window + 1, device=device) >= window + 1 - lengths, ids, 0)


def distinct_sequences(
    users: int, catalogue: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Full rows, as many distinct ids as the places and the catalogue allow: the most columns."""
    places = users * (WINDOW + 1)
    rounds = [
        torch.randperm(catalogue, device=device, generator=generator) for _ in range(-(-places // catalogue))
    ]
    return torch.cat(rounds)[:places].reshape(users, WINDOW + 1) + 1


def matmul_floors(rows: int, columns: int, element: int) -> dict[str, Floor]:
    """One product of users and items; the backward makes the logits again and two products from them."""
    read = (rows + columns) * WIDTH * element
    flops = 2.0 * rows * columns * WIDTH
    return {
        "forward": Floor(read, flops),
        "backward": Floor(2 * read, 3 * flops),
        "both": Floor(3 * read, 4 * flops),
    }


def build_in_batch(users: int, setting: Setting) -> Workload:
    device, generator = setting.device, setting.generator(f"in_batch_loss/{users}")
    ids = distinct_sequences(users, CATALOGUE, device, generator)
    unique = deduplicate(ids, backend="eager")
    columns = unique.ids.numel()
    log_popularity = torch.rand(columns, device=device, generator=generator).add(0.01).log() - 9
    floors = matmul_floors(users * WINDOW, columns, setting.dtype.itemsize)

    def one_set() -> list[Tensor]:
        return [
            torch.randn(users, WINDOW, WIDTH, device=device, generator=generator).to(setting.dtype),
            torch.randn(columns, WIDTH, device=device, generator=generator).to(setting.dtype),
            unique.slots,
        ]

    def call(_: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        u, items, slots = inputs
        return [in_batch_loss(u, items, slots, unique.counts, log_popularity, backend=backend)]

    def split(inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Iterator[Part]:
        u, items, slots = inputs
        step = max(1, PART_ELEMENTS // (WINDOW * columns))
        for start in range(0, users, step):
            cut = slice(start, start + step)
            yield Part([u[cut], items, slots[cut]], cotangents, weight=slots[cut].shape[0] / users)

    return Operator(
        setting=setting,
        weights=[],
        sets=[one_set() for _ in range(set_count(floors["forward"].bytes, device))],
        call=call,
        cotangents=[torch.ones((), device=device)],
        floors=floors,
        differentiable=2,
        split=split,
    ).workload()


def build_full(users: int, setting: Setting) -> Workload:
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

    return Operator(
        setting=setting,
        weights=[],
        sets=[one_set() for _ in range(set_count(floors["forward"].bytes, device))],
        call=call,
        cotangents=[torch.ones((), device=device)],
        floors=floors,
        differentiable=2,
        split=split,
        peers={"liger": _liger, "cce": _cce},
    ).workload(
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


for batch, importance in ((64, 8), (1_024, 2), (256, 33), (4_096, 34)):
    tags = {"batch", "loss"} | ({"paper"} if batch in (64, 1_024) else set())
    columns = min(batch * (WINDOW + 1), CATALOGUE)
    register(
        Case(
            name=f"in_batch_loss/rows={batch * WINDOW},columns={columns},d={WIDTH}",
            build=partial(build_in_batch, batch),
            tags=frozenset(tags),
            importance=importance,
            compiled=batch in (64, 1_024),
            reference_bytes=5.0 * 4 * batch * WINDOW * columns,
        )
    )
    register(
        Case(
            name=f"full_loss/rows={batch * WINDOW},columns={CATALOGUE},d={WIDTH}",
            build=partial(build_full, batch),
            tags=frozenset(tags),
            importance=importance + 2,
            compiled=batch == 64,
            reference_bytes=4.0 * 4 * batch * WINDOW * CATALOGUE,
        )
    )
