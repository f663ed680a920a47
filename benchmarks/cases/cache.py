"""The cache: write, open, gather, and a training step whose cost must not follow the catalogue."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases._shared import random_sequences
from benchmarks.cases.side_network import Shape
from benchmarks.cases.step import RECIPE, StepBench
from benchmarks.registry import (
    BACKENDS,
    Case,
    CheckFailed,
    Floor,
    Runnable,
    Setting,
    Unavailable,
    Workload,
    register,
)
from crossan_fast import HiddenStateCache
from crossan_fast.cache.writer import CacheWriter, write_cache

_BLOCK = 4_096


class TemporaryCache:
    """A cache of random bf16 states in a temporary folder that is removed with this object."""

    def __init__(self, shape: Shape, rows: int) -> None:
        size = rows * shape.modalities * shape.levels * shape.width * 2
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free / 3:
            raise Unavailable(f"needs {size / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free")
        self._folder = tempfile.TemporaryDirectory(prefix="crossan_fast-bench-")
        self.path = Path(self._folder.name) / "cache"
        generator = torch.Generator().manual_seed(rows)
        modalities = shape.config().modalities
        block = torch.randn(_BLOCK, shape.levels, shape.width, generator=generator).bfloat16()
        with CacheWriter(self.path, modalities, torch.bfloat16, rows) as writer:
            for number, modality in enumerate(modalities):
                for start in range(1, rows + 1, _BLOCK):
                    stop = min(start + _BLOCK, rows + 1)
                    # Blocks differ by a rotation: random enough, and written at the disk's speed.
                    turned = block.roll(start // _BLOCK + number, dims=2)[: stop - start]
                    writer.write(modality, range(start, stop), turned, None)
            names = [str(row) for row in range(1, rows + 1)]
            writer.commit(names, torch.ones(rows, shape.modalities, dtype=torch.bool), {})

    def forget(self) -> None:
        """Ask the system to drop the files' pages from memory, so that the next reads come from the disk."""
        for file in self.path.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def build_open(shape: Shape, rows: int, setting: Setting) -> Workload:
    """From a folder to something that rows can be read of; plainly, a file of tensors is mapped."""
    folder = TemporaryCache(shape, rows)
    plain = folder.path.parent / "states.pt"
    none = torch.empty(0, dtype=torch.int64)  # rows are checked when they are read

    def make_plain() -> Runnable:
        torch.save(HiddenStateCache.open(folder.path).states("cpu"), plain)
        return Runnable(lambda _: torch.load(plain, mmap=True)[:1])

    def opened(_: int) -> Sequence[Tensor]:
        return HiddenStateCache.open(folder.path).states("cpu", none)[:1]

    def check(name: str, runnable: Runnable) -> None:
        if runnable.forward(0)[0].shape[0] != rows + 1:
            raise CheckFailed(f"{name}: another number of rows")

    return Workload(1, {"eager": make_plain, "host": lambda: Runnable(opened)}, check)


def build_write(shape: Shape, rows: int, setting: Setting) -> Workload:
    """Checked, with checksums, safely on disk when it returns; plainly, one `torch.save`."""
    states = {
        m.name: torch.randn(rows + 1, shape.levels, shape.width).bfloat16() for m in shape.config().modalities
    }
    for tensor in states.values():
        tensor[0] = 0
    folder = tempfile.TemporaryDirectory(prefix="crossan_fast-bench-")

    def written(_: int) -> Sequence[Tensor]:
        write_cache(Path(folder.name) / "cache", states, overwrite=True)
        return []

    def saved(_: int) -> Sequence[Tensor]:
        torch.save(states, Path(folder.name) / "states.pt")
        return []

    def check(name: str, runnable: Runnable) -> None:
        runnable.forward(0)
        if name == "eager":
            return
        read = HiddenStateCache.open(Path(folder.name) / "cache").gather(torch.arange(rows + 1))
        if not all(torch.equal(read[key], tensor) for key, tensor in states.items()):
            raise CheckFailed(f"{name}: what was written is not what is read")

    size = sum(t.numel() * t.element_size() for t in states.values())
    notes = [f"{size / 1e6:.0f} MB in {Path(folder.name).parent}"]
    made = {"eager": lambda: Runnable(saved), "host": lambda: Runnable(written)}
    return Workload(1, made, check, {"run": Floor(2 * size)}, notes)


def build_gather(shape: Shape, rows: int, setting: Setting) -> Workload:
    """A batch's rows of every modality, from mapped files that are in memory; plainly, by indexing them."""
    folder = TemporaryCache(shape, rows)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, rows + 1, (shape.items,), generator=generator) for _ in range(8)]
    cache = HiddenStateCache.open(folder.path)
    if not cache.warm(wait=True):
        raise Unavailable(f"{cache.nbytes / 1e9:.1f} GB of states do not fit the free memory")
    mapped = cache.states("cpu")

    def gathered(index: int) -> Sequence[Tensor]:
        return list(cache.gather(ids[index], setting.device).values())

    def indexed(index: int) -> Sequence[Tensor]:
        return [states[ids[index]].to(setting.device) for states in mapped]

    def check(name: str, runnable: Runnable) -> None:
        for found, states in zip(runnable.forward(0), mapped, strict=True):
            for row, item in enumerate(ids[0].tolist()):
                if not torch.equal(found[row].cpu(), states[item]):
                    raise CheckFailed(f"{name}: row {row} is not item {item}'s")

    size = 2 * 2 * shape.items * shape.modalities * shape.levels * shape.width
    made = {"eager": lambda: Runnable(indexed), "host": lambda: Runnable(gathered)}
    return Workload(8, made, check, {"run": Floor(size)})


def build_step(rows: int, in_memory: bool, setting: Setting) -> Workload:
    """The step at B = 64 with the states in a memory-mapped file, the next batch's rows read ahead.

    Args:
        in_memory: whether the files were read whole before, as they are soon after training began where they
            fit the memory; else every batch's rows come from the disk.
    """
    folder = TemporaryCache(RECIPE, rows)
    cache = HiddenStateCache.open(folder.path)
    generator = setting.generator(f"catalogue/{rows}")
    batches = [random_sequences(64, rows, setting.device, generator) for _ in range(512)]
    bench = StepBench(setting, RECIPE.config(), cache, batches, torch.ones(rows + 1))
    workload = bench.workload()
    distinct = replace(RECIPE, items=sum(b.unique().numel() for b in batches) // len(batches))
    turns = itertools.count()

    def ahead(make: Callable[[], Runnable]) -> Runnable:
        inner = make()

        def step(_: int) -> Sequence[Tensor]:
            # A batch that no implementation has had, whose rows are nowhere yet.
            turn = next(turns)
            cache.touch(batches[(turn + 1) % len(batches)].reshape(-1))
            return inner.forward(turn % len(batches))

        if in_memory:
            if not cache.warm(wait=True):
                raise Unavailable(f"{cache.nbytes / 1e9:.1f} GB of states do not fit the free memory")
        else:
            folder.forget()
        return replace(inner, forward=step)

    made = {name: partial(ahead, workload.implementations[name]) for name in ("eager", *BACKENDS)}
    floor = {"run": distinct.encoder_floors(2)["both"]}
    return replace(workload, implementations=made, floors=floor)


for rows, pages in ((10_000, "memory"), (100_000, "memory"), (1_000_000, "memory"), (1_000_000, "disk")):
    register(
        Case(
            name=f"step_mapped/items={rows},B=64,M={RECIPE.modalities},D={RECIPE.width},pages={pages}",
            build=partial(build_step, rows, pages == "memory"),
            dtypes=("fp32",),
            devices=("cpu",),
            tags=frozenset({"catalogue"}),
            importance=50,
        )
    )
for rows in (10_000, 100_000):
    sizes = f"items={rows},M={RECIPE.modalities},D={RECIPE.width}"
    register(
        Case(
            name=f"cache_open/{sizes}",
            build=partial(build_open, RECIPE, rows),
            dtypes=("bf16",),
            devices=("cpu",),
            tags=frozenset({"cache"}),
            importance=51,
        )
    )
    register(
        Case(
            name=f"cache_gather/rows=704,{sizes}",
            build=partial(build_gather, replace(RECIPE, items=704), rows),
            dtypes=("bf16",),
            tags=frozenset({"cache"}),
            importance=51,
        )
    )
register(
    Case(
        name=f"cache_write/items=5000,M={RECIPE.modalities},D={RECIPE.width}",
        build=partial(build_write, RECIPE, 5_000),
        dtypes=("bf16",),
        devices=("cpu",),
        tags=frozenset({"cache"}),
        importance=52,
    )
)
