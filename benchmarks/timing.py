"""Times: events on a GPU, a monotonic clock on a CPU; implementations take turns, so noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.registry import Runnable

ROUNDS = 5
LONG_ROUNDS = 3  # of what is timed one call at a time
LONG_SECONDS = 3.0  # a call that takes longer is: its noise is a small part of it, and its time is everyone's
MAX_SAMPLES = 200


@dataclass
class Samples:
    """Seconds of each call by pass: `forward`, `backward`, `both`, or `run` alone."""

    passes: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.passes.setdefault(name, []).append(seconds)

    def milliseconds(self, name: str) -> tuple[float, float, float]:
        """p20, p50 and p80."""
        values = [1e3 * s for s in self.passes[name]]
        if len(values) == 1:
            return values[0], values[0], values[0]
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cuts[1], statistics.median(values), cuts[7]


def sample(call: Callable[[], Any], device: torch.device, count: int, warm: int = 2) -> list[float]:
    """Seconds of `count` calls after `warm` unmeasured ones."""
    for _ in range(warm):
        call()
    marks = _Marks(device)
    for _ in range(count):
        marks.set()
        call()
        marks.set()
    return [marks.elapsed(2 * i, 2 * i + 1) for i in range(count)]


def interleaved(
    runnables: Mapping[str, Runnable],
    device: torch.device,
    sets: int,
    seconds: float,
    minimum: int,
) -> dict[str, Samples]:
    """Time every implementation, a block of calls each in turn.

    Args:
        sets: the input sets that calls rotate over.
        seconds: how long each implementation may take in all, in which it gets as many samples as fit, at
            most `MAX_SAMPLES`.
        minimum: samples that each gets however long they take; a quarter of it where one takes over a second,
            `LONG_ROUNDS` where it takes over `LONG_SECONDS`.
    """
    blocks, long = {}, set()
    for name, runnable in runnables.items():
        # The first calls pay for caches, clocks and lazy initialisation, and compilers.
        calls = (_seconds(_block(runnable, device, sets, 0, 1)) for _ in range(2))
        if runnable.once or all(seconds > LONG_SECONDS for seconds in calls):
            blocks[name] = 1
            long.add(name)
            continue
        _block(runnable, device, sets, 1, min(sets, 2) - 1)
        warm = _block(runnable, device, sets, 0, 1)
        once = max(_seconds(warm), 1e-7)
        least = minimum if once < 1 else minimum // 4
        wanted = max(least, 1, min(MAX_SAMPLES, int(seconds / once)))
        blocks[name] = -(-wanted // ROUNDS)
    collected = {name: Samples() for name in runnables}
    for turn in range(ROUNDS):
        for name, runnable in runnables.items():
            if name in long and turn >= LONG_ROUNDS:
                continue
            done = _block(runnable, device, sets, turn * blocks[name], blocks[name])
            for key, values in done.passes.items():
                for value in values:
                    collected[name].add(key, value)
    return collected


def _seconds(samples: Samples) -> float:
    """Of the first call, its passes together."""
    return sum(values[0] for key, values in samples.passes.items() if key != "both")


def _block(runnable: Runnable, device: torch.device, sets: int, first: int, count: int) -> Samples:
    marks = _Marks(device)
    for call in range(first, first + count):
        index = call % sets
        if runnable.begin is not None:
            runnable.begin()
        marks.set()
        outputs = runnable.forward(index)
        marks.set()
        if runnable.backward is not None:
            gradients = runnable.backward(index, outputs)
            marks.set()
            del gradients
        # Freed here: a call must not run beside what the call before it left.
        del outputs
    samples = Samples()
    for call in range(count):
        if runnable.backward is None:
            samples.add("run", marks.elapsed(2 * call, 2 * call + 1))
        else:
            start, middle, end = range(3 * call, 3 * call + 3)
            samples.add("forward", marks.elapsed(start, middle))
            samples.add("backward", marks.elapsed(middle, end))
            samples.add("both", marks.elapsed(start, end))
    return samples


class _Marks:
    """Points in time: of the device's queue on a GPU, of the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._clock: list[float] = []
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(device)

    def set(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._clock.append(time.perf_counter())

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two marks, by their numbers."""
        if not self._cuda:
            return self._clock[end] - self._clock[start]
        self._events[-1].synchronize()
        return self._events[start].elapsed_time(self._events[end]) / 1e3
