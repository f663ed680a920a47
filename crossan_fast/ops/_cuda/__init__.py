"""Finds the CUDA C++ kernels: `csrc/cuda/<op>` serves the op. Compiling waits until one is asked for.

What an op adds stands in a module of its name here: `refuses(request)` where the kernels have limits of their
own, `forward` and `backward` where they are put together with torch's products. Without it the library's op
is called as it stands. `auto` passes the kernels over (`_UNMEASURED`), but for passes that `_passes` gives
them, until a GPU's measurement shows where they beat Triton; ask for them with `backend="cuda"` or
`CROSSAN_FAST_BACKEND=cuda`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from crossan_fast import _build
from crossan_fast.ops._dispatch import Implementation, Request

_UNMEASURED = "not yet measured on a GPU, so only used where asked for by name"
_DTYPES = (torch.bfloat16, torch.float16)


def find(op: str) -> Implementation | None:
    """See `_dispatch`."""
    if not _build.has_source("cuda", op):
        return None
    name = f"{__name__}.{op}"
    module: Any = importlib.import_module(name) if importlib.util.find_spec(name) else None
    own = getattr(module, "refuses", lambda request: None)
    return Implementation(
        getattr(module, "forward", None),
        getattr(module, "backward", None),
        lambda request: own(request) or refuses(request),
        _UNMEASURED,
        lambda: library(),  # by name: tests put an emulator in its place
    )


def library() -> Any:
    """The library's ops, compiled first where they have to be."""
    _build.load("cuda")
    return torch.ops.crossan_fast_cuda


def refuses(request: Request) -> str | None:
    """What every kernel here refuses: other devices, other types, GPUs before Ampere."""
    if request.device != "cuda":
        return "runs on CUDA devices only"
    if "states_grad" in request.features:
        return "states get no gradient from the compiled kernels"
    if request.dtype.is_floating_point and request.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    # Of all, not the current one: a choice holds for every tensor of a device type.
    for number in range(torch.cuda.device_count()):
        if (found := torch.cuda.get_device_capability(number)) < (8, 0):
            return (
                f"needs GPUs of compute capability 8.0 or later, got {found[0]}.{found[1]} of cuda:{number} "
                "(CUDA_VISIBLE_DEVICES leaves one out)"
            )
    return _build.problem("cuda")
