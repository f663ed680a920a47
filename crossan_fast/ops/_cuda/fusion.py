"""MOMEF on csrc/cuda: torch's products around the kernels that route and that run the chosen experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast.ops import _cuda
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
    embeddings: Tensor,
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The router by torch's product, the routing and the chosen experts by csrc/cuda."""
    router_weight, router_bias, *experts = weights
    joined = _joined(embeddings, present, dtype)
    logits = F.linear(joined.float(), router_weight.float(), router_bias.float())
    _, share, assigned, mean, _ = _route(logits, present, top_k, counts)
    items = _cuda.library().experts_forward(joined, share, *experts)
    return [items, assigned, mean, logits]


def backward(
    grad_items: Tensor,
    grad_probability: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    weights: Sequence[Tensor],
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of `embeddings`, then of `weights`, each in its tensor's type."""
    router_weight, _, *experts = weights
    joined = _joined(embeddings, present, dtype)
    probability, share, _, _, total = _route(logits, present, top_k, counts)
    through_experts, grad_share, *grad_experts = _cuda.library().experts_backward(
        grad_items.to(dtype), joined, share, *experts
    )
    grad_logits = _cuda.library().routing_backward(
        grad_share, grad_probability.float(), probability, share, _weights(counts), total
    )
    grad_joined = torch.addmm(through_experts, grad_logits, router_weight.float())
    grads = [
        _masked(grad_joined.view(embeddings.shape), present),
        grad_logits.mT @ joined.float(),
        grad_logits.sum(0),
        *grad_experts,
    ]
    return [g.to(t.dtype) for g, t in zip(grads, (embeddings, *weights), strict=True)]


def _joined(embeddings: Tensor, present: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the router and the experts read, `[N, M·d]`."""
    return _masked(embeddings.to(dtype), present).flatten(1)


def _masked(embeddings: Tensor, present: Tensor | None) -> Tensor:
    return embeddings if present is None else torch.where(present[:, :, None], embeddings, 0)


def _route(
    logits: Tensor, present: Tensor | None, top_k: int | None, counts: Tensor | None
) -> tuple[Tensor, ...]:
    return _cuda.library().routing_forward(logits, present, _weights(counts), top_k or 0)


def _weights(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.float()
