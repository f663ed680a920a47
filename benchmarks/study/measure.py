"""One method measured: its step's time and memory, or its accuracy after training. A row each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks import results, timing
from benchmarks.memory import peak_added
from benchmarks.recipes.records import p20
from benchmarks.study import learning
from benchmarks.study.methods import Method, make_model, trainable
from benchmarks.study.worlds import World
from crossan_fast._sources import ReadAhead
from crossan_fast.training import Batches, TrainStep, make_optimizer
from crossan_fast.training.feed import feed
from crossan_fast.training.graph import GraphedStep, refusal
from crossan_fast.training.malloc import keep_freed_memory

_LIGHT = 4  # of a method without encoders in the loop, so many times the steps are timed


@dataclass(frozen=True)
class Limits:
    """What the command line may set in place of the size's own.

    Attributes:
        steps: timed, of a method with encoders in the loop.
        learned_steps: after which a method that trains encoders stops learning; 0: none is made.
        epochs: after which any other stops.
    """

    steps: int
    learned_steps: int
    epochs: int


def time_row(method: Method, world: World, seed: int, limits: Limits) -> dict[str, Any]:
    """Seconds of steps and of an epoch, and what the method holds and adds in memory."""
    step, batches = _make(method, world, seed)
    fed = list(islice(_fed(method, world, batches, 1), limits.steps * _steps_factor(method)))
    largest = max(fed, key=lambda pair: pair[0].unique().numel())
    _timed(lambda: step(*largest), world.device)
    once = _timed(lambda: step(*largest), world.device)

    def whole() -> None:
        step(*largest)
        step.optimizer.zero_grad(set_to_none=True)  # or the step's own gradients would be held before it

    whole()
    added = peak_added(whole, world.device, times=1 if once > 1 else 3)
    keep_freed_memory()  # as training does
    call: TrainStep | GraphedStep = step
    if method.kind == "cached" and method.backend != "eager" and refusal(step) is None:
        call = GraphedStep(step)
        for pair in (*fed * 4, *_fed(method, world, batches, 2)):  # warm-ups and a capture for each shape
            call(*pair)
    turn = iter(fed)
    samples = timing.sample(lambda: call(*next(turn)), world.device, len(fed), warm=0)
    seconds = {"step_p20_s": p20(samples), "step_s": statistics.median(samples)}
    epoch = seconds["step_s"] * len(batches)
    whole_epoch = None
    if epoch <= world.size.whole:
        whole_epoch = _timed(lambda: [call(*pair) for pair in _fed(method, world, batches, 2)], world.device)
    held, states = _held(step), world.cache.nbytes if method.kind == "cached" else 0
    return {
        "steps": len(samples),
        **{name: _figures(value) for name, value in seconds.items()},
        "steps_an_epoch": len(batches),
        "epoch_s": _figures(epoch),
        "whole_epoch_s": "" if whole_epoch is None else _figures(whole_epoch),
        "trainable": trainable(step.model),
        "held_bytes": held,
        "states_bytes": states,
        "step_bytes": "" if added is None else added,
        "memory_bytes": "" if added is None else held + states + added,
    }


def accuracy_row(method: Method, world: World, seed: int, limits: Limits) -> dict[str, Any]:
    """Test metrics at the best validation epoch."""
    # Of trained encoders this is gigabytes, of another size each step: it would grow to several times that.
    if method.kind != "trained":
        keep_freed_memory()
    step, batches = _make(method, world, seed)
    done = learning.Learning(
        step,
        world,
        {**asdict(method.optimizer()), "batch_size": world.size.batch_size},
        lambda epoch: _fed(method, world, batches, epoch),
        len(batches),
        limits.learned_steps if method.kind == "trained" else limits.epochs * len(batches),
        learning.folder_of(method, world, seed),
    ).run()
    test = learning.metrics(step.model, world, "test")
    return {
        "learned_steps": done.steps,
        "learned_epochs": _figures(done.steps / len(batches)),
        "best_epoch": done.best_epoch,
        "learned_s": _figures(done.seconds),
        "users": world.split.num_users,
        "candidates": world.split.num_items,
        "filter_history": learning.FILTER,
        "validation_ndcg@10": round(done.best, 6),
        "test_hr@10": round(test["hr@10"], 6),
        "test_ndcg@10": round(test["ndcg@10"], 6),
    }


def common(method: Method, world: World, seed: int, phase: str) -> dict[str, Any]:
    """The columns that every row begins with."""
    where = results.environment(world.device)
    names = ("date", "commit", "device", "threads", "torch")
    return {
        **{name: where[name] for name in names},
        "precision": world.size.precision,
        "phase": phase,
        "method": method.name,
        "seed": seed,
    }


def _make(method: Method, world: World, seed: int) -> tuple[TrainStep, Batches]:
    if method.kind == "cached":
        world.cache.to(world.device)
    model, settings = make_model(method, world, seed), method.optimizer()
    optimizer = make_optimizer(model, settings)
    step = TrainStep(model, world.cache, optimizer, settings, world.size.precision)
    return step, Batches(world.split.train, world.size.batch_size, seed)


def _fed(method: Method, world: World, batches: Batches, epoch: int) -> Iterator[tuple[Tensor, ReadAhead]]:
    """An epoch's batches; for encoders in the loop on a GPU with no slot more than there are items."""
    if method.kind == "cached":
        yield from feed(batches, epoch, world.cache, world.device, backend=method.backend)
    else:
        counts = batches.distinct(epoch)
        for ids, count in zip(batches.epoch(epoch), counts, strict=True):
            yield ids, ReadAhead(capacity=count)


def _steps_factor(method: Method) -> int:
    return 1 if method.kind in ("trained", "uncached") else _LIGHT


def _timed(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _held(step: TrainStep) -> int:
    """Bytes of weights, buffers and the optimizer's moments."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    for state in step.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _figures(value: float) -> float:
    return float(f"{value:.5g}")
