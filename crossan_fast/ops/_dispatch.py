"""Which backend runs an op, and why.

A choice depends on what is static (op, device type, dtype, features, the wish), never on sizes, so that
`torch.compile` traces it as a constant; a backend that has several kernels picks among them by size itself.
A choice that falls back because something is missing warns once; `crossan-fast doctor` prints every choice.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from crossan_fast import _build
from crossan_fast._checks import nearest

BACKENDS = ("eager", "cpp", "triton", "cuda")
OPS = (
    "side_network",
    "fusion",
    "sequence_encoder",
    "in_batch_loss",
    "full_loss",
    "topk_scores",
    "rank_of_target",
    "deduplicate",
)

# Files of benchmarks/results/ with rows of `cpp` against eager, by the vectors of the CPU that gave them.
_CPU_RESULTS = {"AVX-512": "intel-xeon-2-cores-avx512.csv"}


@functools.cache
def _measured_on_cpus() -> str:
    vectors, march = _build.vectors(), _build.cpu_march()
    elsewhere = ", ".join(f"{kind} (benchmarks/results/{name})" for kind, name in _CPU_RESULTS.items())
    if march != "native":
        return f"ahead of eager with {elsewhere}; not yet measured when compiled for {march}"
    if vectors not in _CPU_RESULTS:
        return f"ahead of eager with {elsewhere}; not yet measured with {vectors}, which this CPU has"
    return f"measured ahead of eager with {vectors}, see benchmarks/results/{_CPU_RESULTS[vectors]}"


# The order in which `auto` tries backends, by device type, each with the reason for its place (or what tells
# it at run time); the first that accepts is picked.
_ORDER: dict[str, dict[str, str | Callable[[], str]]] = {
    "cpu": {
        "cpp": _measured_on_cpus,
        "eager": "nothing faster serves this op here",
    },
    "cuda": {
        "triton": "ahead of eager by estimate, kernels/README.md; not yet measured on a GPU",
        "cuda": "next after triton; not yet measured on a GPU",
        "eager": "nothing faster serves this op here",
    },
}

# Where torch's own kernels are what an op is meant to run on, with the reason; no warning is due there.
_EAGER_BY_DESIGN = {
    (
        "sequence_encoder",
        "cuda",
    ): "torch's scaled_dot_product_attention, or xformers' where the config says so, captured with the step",
}

# Calls that run an op's reference whatever is picked for it, by op and device, for `crossan-fast doctor`.
REFERENCE_CALLS = {
    ("side_network", "cpu"): "where states require gradients (a FallbackWarning says so)",
    ("side_network", "cuda"): "where states require gradients (a FallbackWarning says so)",
    ("deduplicate", "cpu"): "without a capacity under torch.compile, which has to know the size",
    ("deduplicate", "cuda"): "without a capacity: the GPU has to be asked for the size then; "
    "item_ids.numel() + 1 always fits",
}

# Registration modules; imported when a backend is first asked for, and free of side effects until then.
_MODULES = {
    "cpp": "crossan_fast.ops._compiled",
    "cuda": "crossan_fast.ops._cuda",
    "triton": "crossan_fast.ops._triton",
}


class FallbackWarning(UserWarning):
    """An op runs on a slower backend than `auto` prefers, for the reasons in the message."""


class BackendUnavailable(RuntimeError):
    """The backend that was asked for can't serve the op; the message holds every reason."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to run.

    Attributes:
        op: one of `OPS`.
        device: device type, `cpu` or `cuda`.
        dtype: the type to compute in.
        features: what else matters, e.g. `states_grad` (gradients of the states are wanted) or a size of the
            model that a backend may have a limit on (`levels=7`).
    """

    op: str
    device: str
    dtype: torch.dtype
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Implementation:
    """A backend's host functions for one op.

    Attributes:
        forward: see the op's file for arguments.
        backward: likewise; None for ops without a gradient.
        refuses: why the backend can't serve a request, or None where it can.
        not_by_default: why `auto` passes it over although it can, or None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    refuses: Callable[[Request], str | None] = lambda request: None
    not_by_default: str | None = None


@dataclass(frozen=True)
class Choice:
    """Attributes:
    backend: the pick.
    reason: why it, in words.
    rejected: the backends tried before it, each with its reason.
    """

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


_table: dict[tuple[str, str], Implementation] = {}


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Called by the registration modules."""
    _table[op, backend] = implementation


def implementation(op: str, backend: str) -> Implementation:
    """The host functions behind a choice that was made."""
    problem = _load(backend)
    if problem or (op, backend) not in _table:
        raise BackendUnavailable(f"{op}: backend {backend!r}: {problem or 'has no kernel for this op'}")
    return _table[op, backend]


@functools.cache
def _load(backend: str) -> str | None:
    try:
        importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return f"{_MODULES[backend]} cannot be imported: {error}"
    return None


def refusal(request: Request, backend: str) -> str | None:
    """Why `backend` can't serve `request`, or None."""
    if backend == "eager":
        return None
    if problem := _load(backend):
        return problem
    if (request.op, backend) not in _table:
        return "has no kernel for this op"
    return _table[request.op, backend].refuses(request)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is `auto` or one of `BACKENDS`."""
    _wanted(backend)


@torch.compiler.assume_constant_result
def has_kernel(op: str, backend: str) -> bool:
    """Whether a backend's registration module offers `op` at all; `auto` and `eager` offer every op."""
    if backend in ("auto", "eager"):
        return True
    return _load(backend) is not None or (op, backend) in _table


def _passed_over(request: Request, backend: str) -> str | None:
    if backend == "eager" or _load(backend) or (request.op, backend) not in _table:
        return None  # for refusal() to put into words
    return _table[request.op, backend].not_by_default


@torch.compiler.assume_constant_result
def choose(
    op: str, device: str, dtype: torch.dtype, features: tuple[str, ...] = (), backend: str = "auto"
) -> Choice:
    """Pick the backend of one op.

    `CROSSAN_FAST_BACKEND` takes the place of `auto`.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: a backend that was asked for by name refuses.
    """
    return _choose(Request(op, device, dtype, features), _wanted(backend))


def foresee(op: str, device: str, dtype: torch.dtype) -> Choice:
    """What `choose` picks, told without building what is not built yet, and forgotten."""
    with _build.foreseeing():
        return _choose.__wrapped__(Request(op, device, dtype), _wanted("auto"))


def _wanted(backend: str) -> str:
    name, source = backend, "backend"
    if backend == "auto":
        name, source = os.environ.get("CROSSAN_FAST_BACKEND") or "auto", "CROSSAN_FAST_BACKEND"
    if name not in ("auto", *BACKENDS):
        options = ("auto", *BACKENDS)
        raise ValueError(f"{source}: expected one of {list(options)}, got {name!r}{nearest(name, options)}")
    return name


@functools.cache
def _choose(request: Request, wanted: str) -> Choice:
    if wanted != "auto":
        if reason := refusal(request, wanted):
            raise BackendUnavailable(
                f"{request.op}: backend {wanted!r} was asked for on {request.device} in "
                f"{request.dtype}, but {reason}"
            )
        return Choice(wanted, "asked for by name")
    if by_design := _EAGER_BY_DESIGN.get((request.op, request.device)):
        return Choice("eager", by_design)
    rejected: list[tuple[str, str]] = []
    for backend, reason_for in _ORDER.get(request.device, {}).items():
        if reason := _passed_over(request, backend) or refusal(request, backend):
            rejected.append((backend, reason))
            continue
        if rejected and backend == "eager":
            why = "; ".join(f"{name}: {text}" for name, text in rejected)
            warnings.warn(
                f"{request.op} runs eager on {request.device} ({why}); see `crossan-fast doctor`",
                FallbackWarning,
                stacklevel=2,
            )
        why = reason_for if isinstance(reason_for, str) else reason_for()
        return Choice(backend, why, tuple(rejected))
    return Choice("eager", f"the only backend for {request.device}", tuple(rejected))


def compute_dtype(device: str, default: torch.dtype) -> torch.dtype:
    """The type an op computes in: autocast's where it is on, else its parameters'."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else default
