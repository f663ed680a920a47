"""Which backend runs an op, and why.

A choice depends on what is static (op, device type, dtype, features, the wish), never on sizes, so that
`torch.compile` traces it as a constant; a backend that has several kernels picks among them by size itself.
A choice that falls back because something is missing warns once; `crossan-fast doctor` prints every choice.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crossan_fast import _build
from crossan_fast._checks import nearest
from crossan_fast._compiling import constant_in_graphs
from crossan_fast.ops import _passes

BACKENDS = ("eager", "cpp", "triton", "cuda")
# Every file or folder of ops/ whose name is no private one is an op.
OPS = tuple(
    sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))
)

# Files of benchmarks/results/ with rows of `cpp` against eager, by the kind of CPU that gave them.
_CPU_RESULTS = {
    "Intel with AVX-512": "intel-xeon-2-cores-avx512.csv",
    "Intel with AVX-512 and AMX": "intel-xeon-2-cores-avx512-amx.csv",
    "AMD with AVX-512": "amd-epyc-2-cores-avx512.csv",
    "AMD with AVX2": "amd-epyc-2-cores-avx2.csv",
}


@functools.cache
def _measured_on_cpus() -> str:
    own, march = _build.cpu_kind(), _build.cpu_march()
    elsewhere = ", ".join(f"{kind} (benchmarks/results/{name})" for kind, name in _CPU_RESULTS.items())
    if march != "native":
        return f"ahead of eager on {elsewhere}; not yet measured when compiled for {march}"
    if own not in _CPU_RESULTS:
        return f"ahead of eager on {elsewhere}; not yet measured on {own}, as this CPU is"
    return f"measured ahead of eager on {own}, see benchmarks/results/{_CPU_RESULTS[own]}"


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
EAGER_BY_DESIGN = {
    ("batch_rows", "cpu"): "a CPU's step gathers rows by torch's embedding, whose launches cost nothing",
    ("gather_convert", "cpu"): "the CPU's kernels read rows by id, nothing has to be gathered",
    ("gather_convert", "cuda"): "copies and torch's products; csrc/cuda's one pass is not yet measured",
}

# Calls that run an op's reference whatever is picked for it, by op and device, for `crossan-fast doctor`.
REFERENCE_CALLS = {
    ("side_network", "cpu"): "where states require gradients (a FallbackWarning says so)",
    ("side_network", "cuda"): "where states require gradients (a FallbackWarning says so)",
    ("sequence_encoder", "cuda"): "around xformers' attention where the config says so",
    ("deduplicate", "cpu"): "without a capacity under torch.compile, which has to know the size",
    ("deduplicate", "cuda"): "without a capacity: the GPU has to be asked for the size then; "
    "item_ids.numel() + 1 always fits. By triton more than 16,384 places go to torch's sort",
    ("topk_scores", "cuda"): "by triton for k above 512: few GPUs have shared memory for such lists",
}

# Where a backend's implementations are found: `find(op)` of a module that is imported when first asked.
_MODULES = {
    "cpp": "crossan_fast.ops._cpp",
    "cuda": "crossan_fast.ops._cuda",
    "triton": "crossan_fast.ops._triton",
}


NO_KERNEL = "has no kernel for this op"


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

    def feature(self, name: str, default: str) -> str:
        """The value of a feature `name=value`."""
        values = [value for key, _, value in (f.partition("=") for f in self.features) if key == name]
        return values[0] if values else default

    def size(self, name: str, default: int) -> int:
        """A feature that is a number."""
        return int(self.feature(name, str(default)))

    def sizes(self, name: str) -> list[int]:
        """A feature that is a list of numbers."""
        return [int(value) for value in self.feature(name, "").split(",") if value]


@dataclass(frozen=True)
class Implementation:
    """A backend's host functions for one op.

    Attributes:
        forward: takes the arguments of the op's schema and returns what its fake says.
        backward: likewise of `<op>_backward`; None for ops without a gradient.
        refuses: why the backend can't serve a request, or None where it can.
        not_by_default: why `auto` passes it over although it can, or None.
        library: loads a compiled library and gives its ops, which have the schemas of those registered: one
            of the pass's name runs where there is no function. None: there is no library.
    """

    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    refuses: Callable[[Request], str | None] = lambda request: None
    not_by_default: str | None = None
    library: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Choice:
    """Attributes:
    backend: the pick, of the forward where the passes have one each.
    reason: why it, in words.
    rejected: the backends tried before it, each with its reason.
    backward: the backward's, where it is another than the forward's.
    """

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    backward: str | None = None

    @property
    def passes(self) -> str:
        """What a registered op takes as its backend."""
        return _passes.joined(self.backend, self.backward or self.backend)


def host_function(op: str, part: str, backend: str) -> Callable[..., Any]:
    """What runs `part` of an op, `forward` or `backward`, by the choice that was made."""
    found = _find(op, backend)
    if isinstance(found, str):
        raise BackendUnavailable(f"{op}: backend {backend!r}: {found}")
    function: Callable[..., Any] | None = getattr(found, part)
    if function is None and found.library is not None:
        function = getattr(found.library(), op if part == "forward" else f"{op}_backward").default
    if function is None:
        raise BackendUnavailable(f"{op}: backend {backend!r}: has no {part}")
    return function


@functools.cache
def _find(op: str, backend: str) -> Implementation | str:
    """A backend's host functions for an op, or why it has none."""
    try:
        found = importlib.import_module(_MODULES[backend]).find(op)
    except ImportError as error:
        return f"{_MODULES[backend]} cannot be imported: {error}"
    return found or NO_KERNEL


def refusal(request: Request, backend: str) -> str | None:
    """Why `backend` can't serve `request`, or None."""
    if backend == "eager":
        return None
    found = _find(request.op, backend)
    return found if isinstance(found, str) else found.refuses(request)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is `auto` or one of `BACKENDS`."""
    _wanted(backend)


@constant_in_graphs
def has_kernel(op: str, backend: str) -> bool:
    """Whether a backend offers `op` at all; `auto` and `eager` offer every op.

    So does one that cannot be imported, until `choose` says why it cannot.
    """
    return backend in ("auto", "eager") or _find(op, backend) != NO_KERNEL


def _passed_over(request: Request, backend: str) -> str | None:
    found = _find(request.op, backend) if backend != "eager" else None
    return found.not_by_default if isinstance(found, Implementation) else None


@constant_in_graphs
def choose(
    op: str, device: str, dtype: torch.dtype, features: tuple[str, ...] = (), backend: str = "auto"
) -> Choice:
    """Pick the backend of one op.

    `CROSSAN_FAST_BACKEND` takes the place of `auto`. While `torch.export` or `torch.onnx` traces, it is eager
    whatever was asked for: what is exported runs where this library's ops are not.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: a backend that was asked for by name refuses.
    """
    wanted = _wanted(backend)
    if exporting():
        return Choice("eager", "exported as plain torch")
    return _choose(Request(op, device, dtype, features), wanted)


def exporting() -> bool:
    """Whether `torch.export` or `torch.onnx` traces."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


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
        raise ValueError(
            f"{source}: expected one of {list(options)}, got {name!r}{nearest(str(name), options)}"
        )
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
    if by_design := EAGER_BY_DESIGN.get((request.op, request.device)):
        return Choice("eager", by_design)
    passes = _passes.preferred(request.op) if request.device == "cuda" else None
    order = _ORDER.get(request.device, {})
    if passes is not None and passes.forward in order:
        order = {passes.forward: order[passes.forward], **order}
    rejected: list[tuple[str, str]] = []
    for backend, reason_for in order.items():
        passed_over = None if passes and backend == passes.forward else _passed_over(request, backend)
        if reason := passed_over or refusal(request, backend):
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
        choice = Choice(backend, why, tuple(rejected))
        return choice if passes is None else _with_backward(request, choice, passes)
    return Choice("eager", f"the only backend for {request.device}", tuple(rejected))


def _with_backward(request: Request, choice: Choice, passes: _passes.Passes) -> Choice:
    """The choice with the backend that its backward is better run by, where there is one that can."""
    forward = choice.backend
    if forward not in _passes.SHARED[request.op] or forward == passes.backward:
        return choice
    if reason := refusal(request, passes.backward):
        return replace(choice, rejected=(*choice.rejected, (f"{passes.backward} backward", reason)))
    reason = f"{choice.reason}; its backward by {passes.backward}: {passes.reason}"
    return replace(choice, reason=reason, backward=passes.backward)


def compute_dtype(device: str, default: torch.dtype) -> torch.dtype:
    """The type an op computes in: autocast's where it is on, else its parameters'."""
    if device == "meta":  # nothing is computed there, and torch raises for a question about its autocast
        return default
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else default


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Within the block nothing is cast on a device of this type."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
