"""Epochs of the Scientific data: of its sequences, and of random ones of their shape, which need no data."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases._shared import WINDOW
from benchmarks.cases.side_network import CATALOGUE, Shape
from benchmarks.cases.step import PAPER, RECIPE, Made, StepBench, random_cache
from benchmarks.registry import KERNELS, Case, Runnable, Setting, Unavailable, Workload, register
from crossan_fast.data import leave_one_out, read_interactions, read_items
from crossan_fast.training import Batches
from crossan_fast.training.feed import feed

USERS = 64

# Figures of the data's training rows (both held-out items off): users by how many items they have, and how
# often the item of some ranks occurs, in between which the logarithm of either is taken to be linear.
LENGTHS = {3: 4892, 4: 2652, 5: 1465, 6: 895, 7: 609, 8: 356, 9: 300, 10: 208, 11: 699}
POPULARITY = {1: 1262, 3: 688, 11: 166, 101: 63, 1_001: 14, 5_001: 3, 9_291: 1, CATALOGUE: 1}


def synthetic_sequences(setting: Setting) -> Tensor:
    """Item ids int64 `[12,076, S + 1]`, left-padded with 0, ids in order of popularity."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same sequences on every device
    lengths = torch.tensor([n for n, users in LENGTHS.items() for _ in range(users)])
    lengths = lengths[torch.randperm(len(lengths), generator=generator)][:, None]
    ranks = torch.tensor(list(POPULARITY), dtype=torch.float64).log()
    counts = torch.tensor(list(POPULARITY.values()), dtype=torch.float64).log()
    wanted = torch.arange(1, CATALOGUE + 1, dtype=torch.float64).log()
    right = torch.searchsorted(ranks, wanted).clamp(1, len(ranks) - 1)
    share = (wanted - ranks[right - 1]) / (ranks[right] - ranks[right - 1])
    weights = torch.lerp(counts[right - 1], counts[right], share).exp()
    size = (len(lengths), WINDOW + 1)
    ids = 1 + torch.multinomial(weights, size[0] * size[1], replacement=True, generator=generator).view(size)
    padded = torch.arange(size[1]) >= size[1] - lengths
    return torch.where(padded, ids, 0).to(setting.device)


def scientific_sequences(setting: Setting) -> tuple[Tensor, Tensor]:
    """The training rows, and how often each item occurs in them; `Unavailable` where the data is not."""
    folder = Path(os.environ.get("CROSSAN_FAST_DATA", "")) / "scientific"
    if not (folder / "users.tsv").is_file():
        raise Unavailable("CROSSAN_FAST_DATA names no folder with scientific/users.tsv")
    items = read_items(folder / "items.tsv")
    split = leave_one_out(read_interactions(folder / "users.tsv", items.names), WINDOW)
    return split.train.to(setting.device), split.train_counts


def build_scientific(shape: Shape, setting: Setting) -> Workload:
    return _build(shape, *scientific_sequences(setting), setting)


def build_synthetic(shape: Shape, setting: Setting) -> Workload:
    sequences = synthetic_sequences(setting)
    counts = torch.bincount(sequences.cpu().flatten(), minlength=CATALOGUE + 1)
    counts[0] = 0
    return _build(shape, sequences, counts, setting)


def _build(shape: Shape, sequences: Tensor, counts: Tensor, setting: Setting) -> Workload:
    """Epochs as training runs them, with random states."""
    batches = Batches(sequences, USERS, seed=0)
    cache = random_cache(shape, len(counts) - 1, setting, torch.bfloat16)
    bench = StepBench(setting, shape.config(), cache, list(batches.epoch(1)), counts)
    made: dict[str, Made] = {}

    def make(name: str) -> Runnable:
        made[name] = bench.made(name)

        def epoch(_: int) -> list[Tensor]:
            fed = feed(batches, 1, cache, setting.device)
            return [torch.stack([made[name].call(ids, ahead) for ids, ahead in fed])]

        return Runnable(epoch, once=True, memory=False)

    def check(name: str, runnable: Runnable) -> None:
        bench.check(name, made[name])
        if made[name].graphed is not None:
            runnable.forward(0)  # a graph for each number of slots

    return Workload(1, {name: partial(make, name) for name in ("eager", *KERNELS)}, check)


for data, build, shapes in (
    ("scientific", build_scientific, (RECIPE,)),
    ("synthetic", build_synthetic, (RECIPE, PAPER)),
):
    for shape in shapes:
        register(
            Case(
                name=f"epoch/data={data},B={USERS},M={shape.modalities},D={shape.width}",
                build=partial(build, shape),
                tags=frozenset({"epoch", *(["recipe"] if data == "scientific" else [])}),
                importance=13 if data == "scientific" else 14,
            )
        )
