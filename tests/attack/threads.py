"""Ops and rows from several threads, after a fork, in spawned processes, on more or fewer threads: the same
bits.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import calls
import kill_points
import torch
from tally import Tally
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossan_fast import HiddenStateCache, _build
from crossan_fast.ops._dispatch import OPS

DRAWN = 3  # calls of each op


def digests(seed: int) -> list[str]:
    """Of what every compiled op gives for some drawn calls, wrong ones counted by their error."""
    _build.load("cpu")
    library = torch.ops.crossan_fast_cpp
    found = []
    for op, arguments in draws(seed):
        try:
            results = getattr(library, op)(*arguments)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            found.append(type(error).__name__)
            continue
        # What the sequence encoder keeps for its backward has room to spare, which nothing writes.
        found.append(_digest(results[0] if op == "sequence_encoder" else results))
    return found


def draws(seed: int) -> list[tuple[str, Any]]:
    """Some calls of each op, drawn anew: no two threads share tensors."""
    state, generator = random.getstate(), torch.Generator()
    generator.set_state(torch.get_rng_state())
    with _LOCK:  # the draws are of the process's own generators
        random.seed(seed)
        torch.manual_seed(seed)
        ops = [op for op in OPS if _build.has_source("cpu", op)]
        drawn = [(op, calls.of(op).draw()) for op in ops for _ in range(DRAWN)]
        random.setstate(state)
        torch.set_rng_state(generator.get_state())
    return drawn


_LOCK = threading.Lock()


def _digest(results: Any) -> str:
    digest = hashlib.sha256()
    for tensor in [results] if isinstance(results, Tensor) else _flat(results):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _flat(results: Any) -> list[Tensor]:
    return [t for r in results for t in (_flat(r) if isinstance(r, (list, tuple)) else [r])]


def in_threads(seed: int, count: int = 8) -> list[list[str]]:
    """From `count` threads at once."""
    found: list[list[str]] = [[] for _ in range(count)]

    def work(place: int) -> None:
        found[place] = digests(seed)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def in_a_fork(seed: int) -> list[str]:
    """From a child of a process whose threads had started."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch's own operators wait for threads that a fork has lost
            os.write(write, "\n".join(digests(seed)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text.split("\n")


def in_a_new_process(seed: int, method: str) -> list[str]:
    """From a process started by `spawn` or `forkserver`."""
    context = torch.multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        return list(pool.apply(digests, (seed,)))


class RowsOf(Dataset[str]):
    """A cache's rows, each as the digest of what a process reads."""

    def __init__(self, cache: HiddenStateCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.num_items + 1

    def __getitem__(self, item: int) -> str:
        return _digest(list(self.cache.gather(torch.tensor([item])).values()))


def in_loaders(cache: HiddenStateCache, method: str) -> list[str]:
    """Rows of a cache that this process has open and has read, from a loader's worker processes."""
    loader = DataLoader(RowsOf(cache), None, num_workers=2, multiprocessing_context=method)
    return list(loader)


def rows(methods: tuple[str, ...], tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kill_points.old_build(Path(folder))
        cache = HiddenStateCache.open(Path(folder) / "c")
        expected = [RowsOf(cache)[item] for item in range(cache.num_items + 1)]
        for method in ("fork", *methods):
            _compare(tally, f"a loader by {method}", expected, in_loaders(cache, method))


def attack(seed: int, methods: tuple[str, ...] = ("spawn", "forkserver")) -> Tally:
    """Every op's bits from everywhere, against those of one thread."""
    tally = Tally("ops from other threads and processes")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = digests(seed)
        for threads in (2, 3, 1, 2):
            torch.set_num_threads(threads)
            _compare(tally, f"set_num_threads({threads})", expected, digests(seed))
        for found in in_threads(seed):
            _compare(tally, "8 threads", expected, found)
        _compare(tally, "fork", expected, in_a_fork(seed))
        for method in methods:
            _compare(tally, method, expected, in_a_new_process(seed, method))
        rows(methods, tally)
    finally:
        torch.set_num_threads(before)
    return tally


def _compare(tally: Tally, where: str, expected: list[str], found: list[str]) -> None:
    for place, one in enumerate(expected):
        same = place < len(found) and found[place] == one
        tally.add(None if same else "other bits", f"{where}, call {place}")
