"""Runs cases: build, check, time, weigh; a row on disk as soon as a case is done. Or checks them alone."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import ceilings, memory, results, timing
from benchmarks.registry import (
    DTYPES,
    REFERENCES,
    Case,
    CheckFailed,
    Runnable,
    Setting,
    Unavailable,
    Workload,
)
from crossan_fast.cache.tiers import free_memory
from crossan_fast.ops import BackendUnavailable

_ALIKE = ("commit", "device", "threads", "torch", "triton")


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        only: implementations; None: all that a case has (compiled where the case asks for it).
        dtypes: names; None: the case's.
        seconds: of timing for each implementation of a case.
        minimum: samples that each gets at least, see `timing.interleaved`.
        budget: seconds after which no further case begins; None: all run.
        missing: leave out cases whose implementations all have rows of this commit in the file.
        path: the CSV file.
    """

    device: torch.device
    path: Path
    only: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    seconds: float = 2.0
    minimum: int = 20
    budget: float | None = None
    missing: bool = False
    say: Callable[[str], None] = print


@dataclass
class Outcome:
    """What a run did; `failures` make it exit with an error."""

    rows: list[results.Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run(cases: Iterable[Case], options: Options) -> Outcome:
    """Measure every case in every dtype."""
    outcome, started = Outcome(), time.monotonic()
    device, say = options.device, options.say
    if device.type == "cpu":
        memory.settle()
    say(f"{results.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    known = _measured(options) if options.missing else set()
    for case, dtype in _typed(cases, options):
        label = f"{case.name} {dtype}"
        if options.budget is not None and time.monotonic() - started > options.budget:
            _skip(outcome, say, label, f"the budget of {options.budget:g} s is used up")
            continue
        say(f"\n{label}")
        _run_case(case, dtype, options, outcome, known)
        _forget(device)
    say(f"\n{len(outcome.rows)} rows, {len(outcome.failures)} failures, {len(outcome.skipped)} skipped")
    return outcome


def check(cases: Iterable[Case], options: Options, calls: int = 0) -> Outcome:
    """Compare every case's implementations with its reference, then call each `calls` times more."""
    outcome, say = Outcome(), options.say
    for case, dtype in _typed(cases, options):
        label = f"{case.name} {dtype}"
        say(f"\n{label}")
        try:
            workload = case.build(Setting(options.device, DTYPES[dtype]))
        except Unavailable as reason:
            _skip(outcome, say, label, str(reason))
            continue
        for name in (name for name in workload.implementations if _asked(case, name, options)):
            runnable = _made(workload, name, f"{label} {name}", options, outcome)
            if runnable is None:
                continue
            say(f"  {name}: as the reference")
            for index in range(calls):
                outputs = runnable.forward(index % workload.sets)
                if runnable.backward is not None:
                    runnable.backward(index % workload.sets, outputs)
        _forget(options.device)
    say(f"\n{len(outcome.failures)} failures, {len(outcome.skipped)} skipped")
    return outcome


def _typed(cases: Iterable[Case], options: Options) -> Iterator[tuple[Case, str]]:
    """Every case in each of its types that is asked for."""
    for case in cases:
        for dtype in case.dtypes:
            if options.dtypes is None or dtype in options.dtypes:
                yield case, dtype


def _forget(device: torch.device) -> None:
    """Compiled code and CUDA graphs' pools of one case would weigh on the next one."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run_case(
    case: Case, dtype: str, options: Options, outcome: Outcome, known: set[tuple[str, str, str]]
) -> None:
    setting = Setting(options.device, DTYPES[dtype])
    label = f"{case.name} {dtype}"
    try:
        workload = case.build(setting)
    except Unavailable as reason:
        _skip(outcome, options.say, label, str(reason))
        return
    asked = [name for name in workload.implementations if _asked(case, name, options)]
    wanted = {(case.name, dtype, name) for name in asked if not _too_large(case, name, options)}
    if wanted and wanted <= known:
        options.say("  has its rows")
        return
    for note in workload.notes:
        options.say(f"  note: {note}")
    ready: dict[str, Runnable] = {}
    for name in asked:
        where = f"{label} {name}"
        if _too_large(case, name, options):
            needs = case.reference_bytes / 1e9
            _skip(outcome, options.say, where, f"needs {needs:.1f} GB, more than is free")
            continue
        runnable = _made(workload, name, where, options, outcome)
        if runnable is not None:
            ready[name] = runnable
    if not ready:
        return
    limits = ceilings.measure(setting.device, setting.dtype)
    samples = _times(ready, workload, options)
    for name, runnable in ready.items():
        peaks = _peaks(runnable, setting.device, samples[name]) if runnable.memory else {}
        rows = []
        for passes in samples[name].passes:
            low, middle, high = samples[name].milliseconds(passes)
            floor = workload.floors.get(passes)
            least = None if floor is None else limits.milliseconds(floor)
            rows.append(
                results.Row(
                    **results.environment(setting.device),
                    case=case.name,
                    backend=name,
                    dtype=dtype,
                    passes=passes,
                    samples=len(samples[name].passes[passes]),
                    p20_ms=low,
                    p50_ms=middle,
                    p80_ms=high,
                    peak_bytes=peaks.get(passes),
                    floor_ms=least,
                    floor_share=None if least is None else least / middle,
                    copy_gbps=limits.copy / 1e9,
                    matmul_tflops=limits.matmul / 1e12,
                )
            )
        results.append(options.path, rows)
        outcome.rows += rows
        options.say(_line(name, rows))


def _measured(options: Options) -> set[tuple[str, str, str]]:
    """Case, dtype and implementation of the rows of this very code and machine."""
    own = results.environment(options.device)
    if not options.path.exists() or own["commit"] == "unknown" or own["commit"].endswith("+"):
        return set()
    alike = [r for r in results.read(options.path) if all(getattr(r, key) == own[key] for key in _ALIKE)]
    return {(r.case, r.dtype, r.backend) for r in alike}


def _made(workload: Workload, name: str, where: str, options: Options, outcome: Outcome) -> Runnable | None:
    """The implementation, checked; None with a reason said where it can't run or is wrong."""
    try:
        with _quiet_compiler():
            runnable = workload.implementations[name]()
            workload.check(name, runnable)
        return runnable
    except (BackendUnavailable, Unavailable) as reason:
        _skip(outcome, options.say, where, str(reason))
    except CheckFailed as problem:
        outcome.failures.append(f"{where}: {problem}")
        options.say(f"  {name}: CHECK FAILED, no speed: {problem}")
    except torch.OutOfMemoryError as problem:
        _skip(outcome, options.say, where, f"out of memory: {str(problem).splitlines()[0]}")
    except Exception as problem:
        # One broken implementation must not take the others' measurements with it; it still fails the run.
        text = (str(problem).strip().splitlines() or [""])[0]
        outcome.failures.append(f"{where}: {type(problem).__name__}: {text}")
        options.say(f"  {name}: FAILED: {type(problem).__name__}: {text}")
    return None


def _times(ready: dict[str, Runnable], workload: Workload, options: Options) -> dict[str, timing.Samples]:
    with _quiet_compiler():
        return timing.interleaved(ready, options.device, workload.sets, options.seconds, options.minimum)


def _peaks(runnable: Runnable, device: torch.device, samples: timing.Samples) -> dict[str, int | None]:
    if runnable.once:
        return {}
    longest = max(max(values) for values in samples.passes.values())
    times = 1 if longest > timing.LONG_SECONDS else 3
    if runnable.backward is None:
        return {"run": memory.peak_added(lambda: runnable.forward(0), device, times)}
    backward = runnable.backward

    def both() -> object:
        outputs = runnable.forward(0)
        return outputs, backward(0, outputs)

    # The backward by itself has no start: what the forward keeps for it is already there.
    return {
        "forward": memory.peak_added(lambda: runnable.forward(0), device, times),
        "both": memory.peak_added(both, device, times),
    }


def _too_large(case: Case, name: str, options: Options) -> bool:
    return name in REFERENCES and case.reference_bytes > 0.8 * free_memory(options.device)


def _asked(case: Case, name: str, options: Options) -> bool:
    if options.only is not None:
        return name in options.only
    return name != "compiled" or case.compiled


def _skip(outcome: Outcome, say: Callable[[str], None], where: str, reason: str) -> None:
    outcome.skipped.append(f"{where}: {reason}")
    say(f"  skipped {where}: {reason}")


@contextlib.contextmanager
def _quiet_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(name: str, rows: list[results.Row]) -> str:
    parts = [f"  {name:<12}"]
    for row in rows:
        share = "" if row.floor_share is None else f", {row.floor_share:.0%} of floor"
        peak = "" if row.peak_bytes is None else f", +{row.peak_bytes / 1e6:.1f} MB"
        parts.append(f"{row.passes} {row.p50_ms:.3f} ms ({row.p20_ms:.3f}–{row.p80_ms:.3f}{share}{peak})")
    return "  ".join(parts)
