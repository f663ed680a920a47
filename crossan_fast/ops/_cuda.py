"""Registers the CUDA C++ kernels of csrc/cuda with the dispatcher; compiling waits until one is asked for.

`auto` passes them over (`_UNMEASURED`) until a GPU's measurement shows where they beat Triton; ask for them
with `backend="cuda"` or `CROSSAN_FAST_BACKEND=cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast import _build
from crossan_fast.ops._dispatch import Implementation, Request, register
from crossan_fast.ops.fusion import FusionWeights
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights, _encode

_UNMEASURED = "not yet measured on a GPU, so only used where asked for by name"
_AUTO_PATH = 0  # Hopper's wgmma on sm_90, mma.sync elsewhere
_BACKWARD_ITEMS = 0  # at a time, which bounds the backward's scratch: the kernels' choice


def _refuses(request: Request, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if request.device != "cuda":
        return "runs on CUDA devices only"
    if "states_grad" in request.features:
        return "states get no gradient from the compiled kernels"
    if request.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return _build.problem("cuda")


def _ops() -> Any:
    _build.load("cuda")
    return torch.ops.crossan_fast_cuda


def _register(
    op: str,
    dtypes: tuple[torch.dtype, ...],
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
) -> None:
    register(
        op,
        "cuda",
        Implementation(forward, backward, lambda request: _refuses(request, dtypes), _UNMEASURED),
    )


def _deduplicate(item_ids: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return _ops().deduplicate(item_ids, capacity)


def _static(structure: SideNetworkStructure, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        structure.widths,
        _encode(structure.sources),
        structure.cross,
        structure.activation,
        structure.temperature,
        dtype,
        _AUTO_PATH,
        _BACKWARD_ITEMS,
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
    tensors = _ops().side_network_forward(
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


class _Experts:
    """Every expert on every item, in batched products: at 4·d hidden units cheaper than sorting items."""

    def __init__(self, joined: Tensor, weights: FusionWeights) -> None:
        dtype, (modalities, _, width) = joined.dtype, weights.w1.shape
        self.w1, self.w2 = weights.w1.to(dtype), weights.w2.to(dtype)
        self.e = joined.view(-1, modalities, width).transpose(0, 1)  # [M, N, d]
        self.pre = torch.baddbmm(weights.b1.to(dtype)[:, None], self.e, self.w1.mT)  # [M, N, f]
        self.inner = F.gelu(self.pre)
        self.out = self.e + torch.baddbmm(weights.b2.to(dtype)[:, None], self.inner, self.w2.mT)  # [M, N, d]


def _fusion(
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    e = [
        F.linear(h.to(dtype), w.to(dtype), b.to(dtype))
        for h, w, b in zip(hidden, weights.head_weight, weights.head_bias, strict=True)
    ]
    if present is not None:
        e = [torch.where(present[:, m, None], x, 0) for m, x in enumerate(e)]
    joined = torch.cat(e, dim=1)
    logits = F.linear(joined.float(), weights.router_weight.float(), weights.router_bias.float())
    _, share, assigned, mean, _ = _route(logits, present, top_k, counts)
    out = _Experts(joined, weights).out
    items = torch.einsum("nm,mnd->nd", share, out.float()).to(dtype)
    return items, assigned, mean, [joined, logits]


def _fusion_backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    saved: Sequence[Tensor],
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    joined, logits = saved
    probability, share, _, _, total = _route(logits, present, top_k, counts)
    experts = _Experts(joined, weights)
    grad = grad_items.float()
    grad_share = torch.einsum("nd,mnd->nm", grad, experts.out.float())
    grad_logits = _ops().routing_backward(
        grad_share, grad_probability.float(), probability, share, _weights(counts), total
    )
    grad_out = (share.mT[:, :, None] * grad).to(dtype)  # [M, N, d]
    grad_pre = torch.ops.aten.gelu_backward(grad_out @ experts.w2, experts.pre)
    grad_e = grad_out + grad_pre @ experts.w1
    through_router = grad_logits @ weights.router_weight.float()  # [N, M·d]
    grad_joined = grad_e.transpose(0, 1).reshape(joined.shape) + through_router.to(dtype)
    modalities = len(hidden)
    grads = list(grad_joined.view(len(joined), modalities, -1).unbind(1))
    if present is not None:
        grads = [torch.where(present[:, m, None], g, 0) for m, g in enumerate(grads)]
    grad_hidden = [
        (g @ w.to(dtype)).to(h.dtype) for g, w, h in zip(grads, weights.head_weight, hidden, strict=True)
    ]
    grad_weights = [
        *(g.mT @ h.to(dtype) for g, h in zip(grads, hidden, strict=True)),
        *(g.float().sum(0) for g in grads),
        grad_logits.mT @ joined.float(),
        grad_logits.sum(0),
        grad_pre.mT @ experts.e,
        grad_pre.float().sum(1),
        grad_out.mT @ experts.inner,
        grad_out.float().sum(1),
    ]
    flat = [*weights.head_weight, *weights.head_bias, *weights[2:]]
    return grad_hidden, [g.to(w.dtype) for g, w in zip(grad_weights, flat, strict=True)]


def _route(
    logits: Tensor, present: Tensor | None, top_k: int | None, counts: Tensor | None
) -> tuple[Tensor, ...]:
    return _ops().routing_forward(logits, present, _weights(counts), top_k or 0)


def _weights(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.float()


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

_register("deduplicate", (torch.int64,), _deduplicate)
_register("side_network", _SIXTEEN_BITS, _side_network, _side_network_backward)
_register("fusion", (*_SIXTEEN_BITS, torch.float32), _fusion, _fusion_backward)
