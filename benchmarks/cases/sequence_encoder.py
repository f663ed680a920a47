"""sequence_encoder at the recipe's size: users' lengths as random_sequences draws them, and full rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases._shared import WIDTH, WINDOW, random_sequences
from benchmarks.operators import Operator, Part, set_count
from benchmarks.registry import Case, Floor, Setting, Workload, register
from crossan_fast.ops import SequenceEncoderBlock, SequenceEncoderWeights, sequence_encoder

HEADS, BLOCKS, INNER = 2, 2, 4 * WIDTH


def weights(setting: Setting) -> list[Tensor]:
    generator = setting.generator("sequence_encoder/weights")
    square, wide = (WIDTH, WIDTH), (INNER, WIDTH)
    vector = (WIDTH,)
    block = [square] * 4 + [vector] * 2 + [wide, (INNER,), (WIDTH, INNER)] + [vector] * 3
    shapes = [(WINDOW, WIDTH), vector, vector, *block * BLOCKS]
    flat = [
        torch.randn(shape, device=setting.device, generator=generator) * shape[-1] ** -0.5 for shape in shapes
    ]
    for index in range(BLOCKS):
        # Half the units on, half off, none near ReLU's kink: of millions of them rounding would switch a few,
        # each a jump in the gradients that says nothing about anyone's sums.
        flat[12 * index + 9].mul_(0.1)
        flat[12 * index + 10].sign_()
    return flat


def unflatten(flat: Sequence[Tensor]) -> SequenceEncoderWeights:
    blocks = [SequenceEncoderBlock(*flat[i : i + 12]) for i in range(3, len(flat), 12)]
    return SequenceEncoderWeights(flat[0], flat[1], flat[2], blocks)


def floors_of(rows: int, element: int) -> dict[str, Floor]:
    """Products of real places alone; the backward has two for each of the forward's."""
    flops = 2.0 * rows * BLOCKS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    read = 2.0 * rows * WIDTH * element
    return {
        "forward": Floor(read, flops),
        "backward": Floor(2 * read, 2 * flops),
        "both": Floor(3 * read, 3 * flops),
    }


def build(users: int, full: bool, setting: Setting) -> Workload:
    device, generator = setting.device, setting.generator(f"sequence_encoder/{users}")
    ids = random_sequences(users, 1000, device, generator)[:, 1:]
    mask = torch.ones_like(ids, dtype=torch.bool) if full else ids != 0
    floors = floors_of(int(mask.sum()), setting.dtype.itemsize)
    size = (users, WINDOW, WIDTH)

    def call(flat: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        items, real = inputs
        return [sequence_encoder(items, real, unflatten(flat), HEADS, backend=backend)]

    def split(inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Iterator[Part]:
        for start in range(0, users, 1024):
            cut = slice(start, start + 1024)
            yield Part([tensor[cut] for tensor in inputs], [tensor[cut] for tensor in cotangents])

    return Operator(
        setting=setting,
        weights=weights(setting),
        sets=[
            [torch.randn(size, device=device, generator=generator).to(setting.dtype), mask]
            for _ in range(set_count(floors["forward"].bytes, device))
        ],
        call=call,
        cotangents=[torch.randn(size, device=device, generator=generator)],
        floors=floors,
        differentiable=1,
        split=split,
    ).workload()


for _users in (64, 256, 1_024, 4_096):
    for _full in (False, True):
        register(
            Case(
                name=f"sequence_encoder/B={_users},S={WINDOW}{',full' if _full else ''}",
                build=partial(build, _users, _full),
                dtypes=("fp32",),
                devices=("cpu",),
                tags=frozenset({"paper", "batch"} if _users in (64, 1_024) else {"batch"}),
                importance=12 if _users == 64 else 46,
                compiled=_users == 64 and not _full,
                reference_bytes=150.0 * _users * WINDOW * WIDTH,
            )
        )
