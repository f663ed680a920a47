"""MOMEF on csrc/cuda: torch's products around the kernels that route and that run the chosen experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast.ops import _cuda
from crossan_fast.ops._contracts import FusionWeights
from crossan_fast.ops._dispatch import Request


def refuses(request: Request) -> str | None:
    """See `crossan_fast.ops._cuda`."""
    width, hidden, modalities = (request.size(name, 8) for name in ("width", "hidden", "modalities"))
    if width % 8 or width > 128:
        return f"serves item widths that are multiples of 8 up to 128, not {width}"
    if hidden % 8:
        return f"serves experts whose hidden units are a multiple of 8, not {hidden}"
    if modalities > 16:
        return f"serves at most 16 modalities, not {modalities}"
    return None


def forward(
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Heads and router by torch's products, the routing and the chosen experts by csrc/cuda."""
    own = FusionWeights.unflatten(weights)
    e = [
        F.linear(h.to(dtype), w.to(dtype), b.to(dtype))
        for h, w, b in zip(hidden, own.head_weight, own.head_bias, strict=True)
    ]
    if present is not None:
        e = [torch.where(present[:, m, None], x, 0) for m, x in enumerate(e)]
    joined = torch.cat(e, dim=1)
    logits = F.linear(joined.float(), own.router_weight.float(), own.router_bias.float())
    _, share, assigned, mean, _ = _route(logits, present, top_k, counts)
    items = _cuda.library().experts_forward(joined, share, *own[4:])
    return [items, assigned, mean, joined, logits]


def backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    saved: Sequence[Tensor],
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of `hidden`, then of `weights`, each in its tensor's type."""
    own = FusionWeights.unflatten(weights)
    joined, logits = saved
    probability, share, _, _, total = _route(logits, present, top_k, counts)
    through_experts, grad_share, *grad_experts = _cuda.library().experts_backward(
        grad_items.to(dtype), joined, share, *own[4:]
    )
    grad_logits = _cuda.library().routing_backward(
        grad_share, grad_probability.float(), probability, share, _weights(counts), total
    )
    grad_joined = torch.addmm(through_experts, grad_logits, own.router_weight.float()).to(dtype)
    grads = list(grad_joined.view(len(joined), len(hidden), own.w1.shape[2]).unbind(1))
    if present is not None:
        grads = [torch.where(present[:, m, None], g, 0) for m, g in enumerate(grads)]
    grad_hidden = [
        (g @ w.to(dtype)).to(h.dtype) for g, w, h in zip(grads, own.head_weight, hidden, strict=True)
    ]
    grad_weights = [
        *(g.mT @ h.to(dtype) for g, h in zip(grads, hidden, strict=True)),
        *(g.float().sum(0) for g in grads),
        grad_logits.mT @ joined.float(),
        grad_logits.sum(0),
        *grad_experts,
    ]
    return grad_hidden + [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def _route(
    logits: Tensor, present: Tensor | None, top_k: int | None, counts: Tensor | None
) -> tuple[Tensor, ...]:
    return _cuda.library().routing_forward(logits, present, _weights(counts), top_k or 0)


def _weights(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.float()
