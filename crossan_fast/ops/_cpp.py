"""Finds the compiled kernels: `csrc/cpu/<op>` serves the op. Compiling waits until one is asked for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from crossan_fast import _build
from crossan_fast.ops._dispatch import Implementation, Request

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def find(op: str) -> Implementation | None:
    """See `_dispatch`."""
    if not _build.has_source("cpu", op):
        return None
    forward, backward = (functools.partial(_call, name) for name in (op, f"{op}_backward"))
    return Implementation(forward, backward, _refuses)


def _call(name: str, *arguments: Any) -> Any:
    """The library's op of that name, which has the registered one's schema."""
    _build.load("cpu")
    return getattr(torch.ops.crossan_fast_cpp, name)(*arguments)


def _refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return "runs on CPUs only"
    if "states_grad" in request.features:
        return "states get no gradient from the compiled kernels"
    if request.op != "deduplicate" and request.dtype not in _DTYPES:
        return f"has no kernel for {request.dtype}"
    return _build.problem("cpu")
