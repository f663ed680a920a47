"""Registers the Triton kernels; imported when the Triton backend is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crossan_fast.kernels import (
    _common,
    deduplicate,
    full_loss,
    fusion,
    in_batch_loss,
    rank_of_target,
    side_network,
    topk_scores,
)
from crossan_fast.ops._dispatch import Implementation, Request, register

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _refuses(request: Request) -> str | None:
    """What every kernel here refuses: other devices than CUDA, float64."""
    if reason := _common.refuses_device(request.device):
        return reason
    if request.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        return f"computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"
    return None


def _register(op: str, module: Any, refuses: Callable[[Request], str | None] = _refuses) -> None:
    register(op, "triton", Implementation(module.forward, getattr(module, "backward", None), refuses))


_register("in_batch_loss", in_batch_loss)
_register("full_loss", full_loss)
_register("topk_scores", topk_scores)
_register("rank_of_target", rank_of_target)
_register("fusion", fusion)


def _refuses_side_network(request: Request) -> str | None:
    if "states_grad" in request.features:
        return "gives no gradient to states: the backbones are frozen"
    return _refuses(request)


_register("side_network", side_network, _refuses_side_network)
_register("deduplicate", deduplicate, lambda request: _common.refuses_device(request.device))
