"""fusion: MOMEF, the mixture of modality expert fusion ◊ (SPEC, "MOMEF").

    e_m = W_head,m h_m + b_head,m            p = softmax(W_r [e_1 ‖ … ‖ e_M] + b_r)
    E_m(e) = e + W2_m · gelu(W1_m e + b1_m) + b2_m          item = Σ_m p_m · E_m(e_m)

With `top_k` only the k most probable experts of an item run (ties go to the modality that comes first), their
weights renormalised. ◊ An absent modality enters the router as zeros, has logit −inf, and its expert does not
run; an item with no present modality gets zeros (the model refuses such an item by name before).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FusionWeights(NamedTuple):
    """The trainable tensors of MOMEF; M modalities, item width d, expert hidden width f (4d).

    Attributes:
        head_weight: per modality `[d, D_m]`.
        head_bias: per modality `[d]`.
        router_weight: `[M, M·d]`.
        router_bias: `[M]`.
        w1: `[M, f, d]`.
        b1: `[M, f]`.
        w2: `[M, d, f]`.
        b2: `[M, d]`.
    """

    head_weight: Sequence[Tensor]
    head_bias: Sequence[Tensor]
    router_weight: Tensor
    router_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class FusionOutput(NamedTuple):
    """Attributes:
    items: `[N, d]`.
    balance: the load-balance loss without its weight, a scalar ≥ 1 at a uniform router (Switch
        Transformers, arXiv 2101.03961, eq. 4–6, over assignments where k > 1): M · Σ_m f_m · P_m with f_m
        the share of assignments that expert m gets (no gradient) and P_m the mean router probability.
    """

    items: Tensor
    balance: Tensor


def fusion_reference(
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    *,
    present: Tensor | None = None,
    top_k: int | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> FusionOutput:
    """The definition, in plain torch, usable in float64.

    Args:
        hidden: per modality h `[N, D_m]`.
        weights: see `FusionWeights`.
        present: bool `[N, M]`; None: all present.
        top_k: experts per item; None: every present one.
        counts: `[N]`, how often each item counts in `balance`; None: once. With distinct ids and their
            counts, `balance` equals that of the batch with repetitions.
        dtype: the type to compute in; None: the weights'.
    """
    dtype = dtype or weights.w1.dtype
    modalities = range(len(hidden))
    e = [
        F.linear(hidden[m].to(dtype), weights.head_weight[m].to(dtype), weights.head_bias[m].to(dtype))
        for m in modalities
    ]
    if present is not None:
        e = [torch.where(present[:, m, None], e[m], 0) for m in modalities]
    joined = torch.cat(e, dim=1)
    logits = F.linear(joined, weights.router_weight.to(dtype), weights.router_bias.to(dtype))
    exists = present if present is not None else torch.ones_like(logits, dtype=torch.bool)
    probability = _softmax(logits, exists)
    chosen = exists if top_k is None else _top(probability, exists, top_k)
    share = probability if top_k is None else _softmax(logits, chosen)
    items = torch.zeros_like(e[0])
    for m in modalities:
        inner = F.gelu(F.linear(e[m], weights.w1[m].to(dtype), weights.b1[m].to(dtype)))
        expert = e[m] + F.linear(inner, weights.w2[m].to(dtype), weights.b2[m].to(dtype))
        items = items + torch.where(chosen[:, m, None], share[:, m, None] * expert, 0)
    return FusionOutput(items, _balance(probability, exists, 1 if top_k is None else top_k, counts))


def _softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept entries; zeros, not NaN, in a row that keeps none."""
    masked = logits.masked_fill(~keep, float("-inf"))
    empty = ~keep.any(dim=1, keepdim=True)
    return torch.softmax(masked.masked_fill(empty, 0), dim=1).masked_fill(~keep, 0)


def _top(probability: Tensor, exists: Tensor, k: int) -> Tensor:
    # A stable descending sort gives ties to the modality that comes first, on every backend alike.
    order = torch.sort(
        probability.detach().masked_fill(~exists, -1), dim=1, descending=True, stable=True
    ).indices
    return torch.zeros_like(exists).scatter(1, order[:, :k], True) & exists


def _balance(probability: Tensor, exists: Tensor, k: int, counts: Tensor | None) -> Tensor:
    chosen = _top(probability, exists, k).to(probability.dtype)
    weight = exists.any(dim=1).to(probability.dtype)
    if counts is not None:
        weight = weight * counts.to(probability.dtype)
    total = weight.sum().clamp_min(torch.finfo(probability.dtype).tiny)
    assignments = (weight[:, None] * chosen).sum(0)
    fraction = assignments / assignments.sum().clamp_min(torch.finfo(probability.dtype).tiny)
    mean = (weight[:, None] * probability).sum(0) / total
    return probability.shape[1] * (fraction.detach() * mean).sum()
