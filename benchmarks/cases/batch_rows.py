"""batch_rows: from a batch's distinct items to what the sequence encoder and the in-batch loss read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases._shared import WIDTH, WINDOW, random_sequences
from benchmarks.cases.side_network import CATALOGUE
from benchmarks.operators import Operator
from benchmarks.registry import Case, Floor, Setting, Workload, register
from crossan_fast.ops import batch_rows, deduplicate
from crossan_fast.training.feed import bucket


def build(users: int, setting: Setting) -> Workload:
    device, generator = setting.device, setting.generator(f"batch_rows/{users}")
    item_ids = random_sequences(users, CATALOGUE, device, generator)
    places, before = item_ids.numel(), users * WINDOW
    # As many items as training's feed makes room for on a GPU.
    unique = deduplicate(item_ids, bucket(item_ids.unique().numel() + 1, places + 1), backend="eager")
    count = unique.ids.numel()
    popularity = torch.rand(CATALOGUE + 1, device=device, generator=generator).add(0.01)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, WIDTH, device=device, generator=generator)

    def call(_: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        # The rest is made, too; a step's gradients come by these.
        return list(batch_rows(*inputs, backend=backend)[:2])

    row = WIDTH * setting.dtype.itemsize
    forward = (2.0 * count + before + places) * row + 8 * places + before + 16 * count
    backward = (2.0 * count + before) * row + 8 * places
    return Operator(
        setting=setting,
        weights=[],
        # Small enough for any cache, in which a step finds them, too: the encoder has just written them.
        sets=[[drawn(count).to(setting.dtype), unique.slots, unique.ids, popularity] for _ in range(2)],
        call=call,
        cotangents=[drawn(count), drawn(users, WINDOW)],
        floors={
            "forward": Floor(forward),
            "backward": Floor(backward),
            "both": Floor(forward + backward),
        },
        differentiable=1,
    ).workload()


for users in (64, 256, 1_024):
    register(
        Case(
            name=f"batch_rows/users={users},places={users * (WINDOW + 1)},d={WIDTH}",
            build=partial(build, users),
            tags=frozenset({"batch", "gather"} | ({"paper"} if users == 64 else set())),
            importance=10 if users == 64 else 38,
            compiled=users == 64,
        )
    )
