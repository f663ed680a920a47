"""Registers the compiled kernels of csrc/ with the dispatcher; compiling waits until one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crossan_fast import _build
from crossan_fast.ops._dispatch import Implementation, Request, register
from crossan_fast.ops.fusion import FusionWeights
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights, _encode

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return "runs on CPUs only"
    if "states_grad" in request.features:
        return "states get no gradient from the compiled kernels"
    if request.op != "deduplicate" and request.dtype not in _DTYPES:
        return f"has no kernel for {request.dtype}"
    return _build.problem("cpu")


def _ops() -> Any:
    _build.load("cpu")
    return torch.ops.crossan_fast_cpp


def _register(op: str, forward: Callable[..., Any], backward: Callable[..., Any] | None = None) -> None:
    register(op, "cpp", Implementation(forward, backward, _refuses))


def _static(structure: SideNetworkStructure, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        structure.widths,
        _encode(structure.sources),
        structure.cross,
        structure.activation,
        structure.temperature,
        dtype,
    )


def _side_network(
    states: list[Tensor],
    scales: list[Tensor] | None,
    ids: Tensor | None,
    present: Tensor | None,
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    tensors = _ops().side_network(
        states, scales or [], ids, present, weights.flatten(), *_static(structure, dtype)
    )
    towers = len(structure.sources)
    return tensors[:towers], tensors[towers:]


def _side_network_backward(
    grad_outputs: list[Tensor],
    saved: list[Tensor],
    states: list[Tensor],
    scales: list[Tensor] | None,
    ids: Tensor | None,
    present: Tensor | None,
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    dtype: torch.dtype,
) -> list[Tensor]:
    return _ops().side_network_backward(
        grad_outputs,
        saved,
        states,
        scales or [],
        ids,
        present,
        weights.flatten(),
        *_static(structure, dtype),
    )


def _fusion(
    hidden: list[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    flat = [*weights.head_weight, *weights.head_bias, *weights[2:]]
    items, assigned, probability, *saved = _ops().fusion(hidden, flat, present, top_k, counts, dtype)
    return items, assigned, probability, saved


def _fusion_backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    saved: list[Tensor],
    hidden: list[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    flat = [*weights.head_weight, *weights.head_bias, *weights[2:]]
    grads = _ops().fusion_backward(
        grad_items, grad_probability, saved, hidden, flat, present, top_k, counts, dtype
    )
    return grads[: len(hidden)], grads[len(hidden) :]


def _call(name: str) -> Callable[..., Any]:
    """An op of the library whose arguments are the contract's as they stand."""
    return lambda *arguments: getattr(_ops(), name)(*arguments)


_register("side_network", _side_network, _side_network_backward)
_register("fusion", _fusion, _fusion_backward)
for _name in ("sequence_encoder", "in_batch_loss", "full_loss"):
    _register(_name, _call(_name), _call(f"{_name}_backward"))
for _name in ("topk_scores", "rank_of_target", "deduplicate"):
    _register(_name, _call(_name))
