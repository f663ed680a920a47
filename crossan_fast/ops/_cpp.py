"""Finds the compiled kernels: `csrc/cpu/<op>` serves the op. Compiling waits until one is asked for."""

from __future__ import annotations

from typing import Any

import torch

from crossan_fast import _build
from crossan_fast.ops._dispatch import Implementation, Request

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def find(op: str) -> Implementation | None:
    """See `_dispatch`."""
    if not _build.has_source("cpu", op):
        return None
    return Implementation(refuses=_refuses, library=library)


def library() -> Any:
    """The library's ops, compiled first where they have to be."""
    _build.load("cpu")
    return torch.ops.crossan_fast_cpp


def _refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return "runs on CPUs only"
    if "states_grad" in request.features:
        return "states get no gradient from the compiled kernels"
    if request.op != "deduplicate" and request.dtype not in _DTYPES:
        return f"has no kernel for {request.dtype}"
    return _build.problem("cpu")
