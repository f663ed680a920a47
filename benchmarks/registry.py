"""What a case is, and the list of all of them."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# eager: the plain reference in the case's type. autocast: the same with fp32 weights under autocast.
# compiled: torch.compile(eager, mode="max-autotune"). The rest are this project's backends (`-graph`:
# captured in a CUDA graph, as training runs them; `auto-graph`: each pass by the backend that the
# dispatcher picks), what it does with files (`host`), and peers' implementations.
REFERENCES = ("eager", "autocast", "compiled")
BACKENDS = ("cpp", "triton", "cuda")
KERNELS = (*BACKENDS, "triton-graph", "cuda-graph", "auto-graph")
OURS = (*KERNELS, "host")
IMPLEMENTATIONS = (*REFERENCES, *OURS, "liger", "cce", "iisan")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """An implementation can't run this case here; the message says why. A skip, not a failure."""


class CheckFailed(Exception):
    """An implementation's result is not the reference's."""


@dataclass(frozen=True)
class Setting:
    """Where and in what type a case is built."""

    device: torch.device
    dtype: torch.dtype

    def generator(self, name: str, seed: int = 0) -> torch.Generator:
        """Random numbers that depend on the case and set alone."""
        return torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()) + seed)


@dataclass(frozen=True)
class Floor:
    """The least work of a pass: bytes that cross memory and arithmetic, at the machine's ceilings."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Runnable:
    """One implementation of a case, ready to be called.

    Attributes:
        forward: from the number of an input set to the outputs.
        backward: from the set's number and the outputs to the gradients; None for what has none.
        memory: whether the peak memory of a call can be seen from outside (not inside a CUDA graph's pool).
        begin: called before each call, untimed.
        once: timed one call at a time, a few in all and none for warm-up: an epoch.
    """

    forward: Callable[[int], Sequence[Tensor]]
    backward: Callable[[int, Sequence[Tensor]], Sequence[Tensor]] | None = None
    memory: bool = True
    begin: Callable[[], None] | None = None
    once: bool = False


@dataclass(frozen=True)
class Workload:
    """A case with its inputs made.

    Attributes:
        sets: how many input sets the calls rotate over.
        implementations: by name, what makes the `Runnable` (compiling, capturing); may raise `Unavailable`.
        check: raises `CheckFailed` where a result is not the reference's.
        floors: per pass (`forward`, `backward`, `both`, or `run` where there is one pass only).
        notes: printed with the case.
    """

    sets: int
    implementations: Mapping[str, Callable[[], Runnable]]
    check: Callable[[str, Runnable], None]
    floors: Mapping[str, Floor] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: `op/what=value,…`; the key in the results.
        build: makes the inputs; may raise `Unavailable`.
        dtypes: names out of `DTYPES`.
        tags: `paper` (the paper's size), `batch`, `modalities`, `width`, `scaling`, `ci`, … for `--tag`.
        importance: the order of a run, smallest first.
        compiled: whether torch.compile of the reference is measured too (minutes for a large case).
        devices: device types that the case makes sense on.
        reference_bytes: what the plain reference allocates at least, by estimate; where that does not fit the
            free memory it is skipped.
    """

    name: str
    build: Callable[[Setting], Workload]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    tags: frozenset[str] = frozenset()
    importance: int = 50
    compiled: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    reference_bytes: float = 0.0


_cases: dict[str, Case] = {}


def register(case: Case) -> Case:
    """Called by the modules of `benchmarks.cases`."""
    if case.name in _cases:
        raise ValueError(f"case {case.name!r} is registered twice")
    _cases[case.name] = case
    return case


def all_cases() -> list[Case]:
    """Every case, the most important first."""
    from benchmarks import cases

    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    return sorted(_cases.values(), key=lambda case: (case.importance, case.name))


def select(pattern: str | None, tags: Iterable[str] = (), device: str | None = None) -> list[Case]:
    """Cases whose name holds `pattern` (a glob where it has `*`) and that have one of `tags`, if given."""
    wanted = set(tags)

    def fits(case: Case) -> bool:
        if device is not None and device not in case.devices:
            return False
        if wanted and not wanted & case.tags:
            return False
        if pattern is None:
            return True
        return fnmatch.fnmatchcase(case.name, pattern) if "*" in pattern else pattern in case.name

    return [case for case in all_cases() if fits(case)]
