"""in_batch_loss, rows × columns from a batch of 64 users to one of 4,096."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases._shared import (
    LOSS_BATCHES,
    PART_ELEMENTS,
    WIDTH,
    WINDOW,
    distinct_sequences,
    loss_operator,
    matmul_floors,
)
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import Part
from benchmarks.registry import Case, Setting, Workload, register
from crossan_fast.ops import deduplicate, in_batch_loss


def build(users: int, setting: Setting) -> Workload:
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

    return loss_operator(setting, one_set, call, floors, split).workload()


for batch, importance in LOSS_BATCHES:
    columns = min(batch * (WINDOW + 1), CATALOGUE)
    register(
        Case(
            name=f"in_batch_loss/rows={batch * WINDOW},columns={columns},d={WIDTH}",
            build=partial(build, batch),
            tags=frozenset({"batch", "loss"} | ({"paper"} if batch in (64, 1_024) else set())),
            importance=importance,
            compiled=batch in (64, 1_024),
            reference_bytes=5.0 * 4 * batch * WINDOW * columns,
        )
    )
