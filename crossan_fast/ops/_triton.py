"""Finds the Triton kernels: the module or package `crossan_fast.kernels.<op>` serves the op.

It offers `forward`, with a gradient `backward`, and `refuses(request)` where it can't serve all that
`refuses` here lets pass.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from crossan_fast.kernels import _common
from crossan_fast.ops._dispatch import Implementation, Request

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def find(op: str) -> Implementation | None:
    """See `_dispatch`."""
    name = f"crossan_fast.kernels.{op}"
    if importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    own = getattr(module, "refuses", lambda request: None)
    return Implementation(
        module.forward, getattr(module, "backward", None), lambda request: own(request) or refuses(request)
    )


def refuses(request: Request) -> str | None:
    """What every kernel here refuses: other devices than CUDA, float64."""
    if reason := _common.refuses_device(request.device):
        return reason
    if request.dtype.is_floating_point and request.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        return f"computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"
    return None
