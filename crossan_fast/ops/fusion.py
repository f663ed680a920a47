"""fusion: MOMEF, the mixture of modality expert fusion ◊ (docs/mathematics.md, "Fusion").

    p = softmax(W_r [e_1 ‖ … ‖ e_M] + b_r)      E_m(e) = e + W2_m · gelu(W1_m e + b1_m) + b2_m
    item = Σ_m p_m · E_m(e_m)

With `top_k` only the k most probable experts of an item run (ties go to the modality that comes first), their
weights renormalised. ◊ An absent modality enters the router as zeros, has logit −inf, and its expert does not
run; an item with no present modality gets zeros (the model refuses such an item by name before).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast._checks import FLOATS, check_integer, check_range, check_tensor, check_weights, describe
from crossan_fast.ops import _passes
from crossan_fast.ops._contracts import FusionWeights
from crossan_fast.ops._dispatch import choose, compute_dtype
from crossan_fast.ops._registration import define, differentiate, on_one_device


class FusionOutput(NamedTuple):
    """Attributes:
    items: `[N, d]`.
    balance: the load-balance loss without its weight, a scalar ≥ 1 at a uniform router (Switch
        Transformers, arXiv 2101.03961, eq. 4–6, over assignments where k > 1): M · Σ_m f_m · P_m with f_m
        the share of assignments that expert m gets (no gradient) and P_m the mean router probability. In fp32
        (float64 for float64) whatever type the items have: a half type can't count items. None where it was
        not asked for.
    """

    items: Tensor
    balance: Tensor | None


def fusion_reference(
    embeddings: Tensor,
    weights: FusionWeights,
    *,
    present: Tensor | None = None,
    top_k: int | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> FusionOutput:
    """The definition, in plain torch, usable in float64.

    Args:
        embeddings: e `[N, M, d]`, what `side_network` gives.
        weights: see `FusionWeights`.
        present: bool `[N, M]`; None: all present.
        top_k: experts per item; None: every present one.
        counts: `[N]`, how often each item counts in `balance`; None: once. With distinct ids and their
            counts, `balance` equals that of the batch with repetitions.
        dtype: the type to compute in; None: the weights'.
    """
    dtype = dtype or weights.w1.dtype
    e = embeddings.to(dtype)
    if present is not None:
        e = torch.where(present[:, :, None], e, 0)
    exists, probability, chosen, share = _route(
        e, weights.router_weight.to(dtype), weights.router_bias.to(dtype), present, top_k
    )
    items = torch.zeros_like(e[:, 0])
    for m in range(e.shape[1]):
        inner = F.gelu(F.linear(e[:, m], weights.w1[m].to(dtype), weights.b1[m].to(dtype)))
        expert = e[:, m] + F.linear(inner, weights.w2[m].to(dtype), weights.b2[m].to(dtype))
        items = items + torch.where(chosen[:, m, None], share[:, m, None] * expert, 0)
    wide = probability.to(torch.promote_types(dtype, torch.float32))
    return FusionOutput(items, _balance(wide, exists, 1 if top_k is None else top_k, counts))


def expert_weights(
    embeddings: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    *,
    present: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """The weight of each expert in each item, `[N, M]`; arguments as `fusion_reference`.

    Rows sum to 1; what is absent or not among the `top_k` has 0.
    """
    e = embeddings.to(router_weight.dtype)
    if present is not None:
        e = torch.where(present[:, :, None], e, 0)
    return _route(e, router_weight, router_bias, present, top_k)[3]


def _route(
    e: Tensor, weight: Tensor, bias: Tensor, present: Tensor | None, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which experts exist, their probabilities, which are chosen and the weights of these; each `[N, M]`."""
    logits = F.linear(e.flatten(1), weight, bias)
    exists = present if present is not None else torch.ones_like(logits, dtype=torch.bool)
    probability = _softmax(logits, exists)
    if top_k is None:
        return exists, probability, exists, probability
    chosen = _top(probability, exists, top_k)
    return exists, probability, chosen, _softmax(logits, chosen)


def _softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept entries; zeros, not NaN, in a row that keeps none."""
    masked = logits.masked_fill(~keep, float("-inf"))
    empty = ~keep.any(dim=1, keepdim=True)
    return torch.softmax(masked.masked_fill(empty, 0), dim=1).masked_fill(~keep, 0)


def _top(probability: Tensor, exists: Tensor, k: int) -> Tensor:
    """The k most probable of each row; ties go to the modality that comes first, on every backend alike.

    By counting who comes before, not by a stable sort, which ONNX does not have.
    """
    p = probability.detach().masked_fill(~exists, -1)
    mine, other = p[:, :, None], p[:, None, :]
    earlier = torch.ones(p.shape[1], p.shape[1], dtype=torch.bool, device=p.device).tril(-1)
    before = (other > mine) | ((other == mine) & earlier)
    return (before.sum(dim=2) < k) & exists


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


@on_one_device
def fusion(
    embeddings: Tensor,
    weights: FusionWeights,
    *,
    present: Tensor | None = None,
    top_k: int | None = None,
    counts: Tensor | None = None,
    balance: bool = True,
    backend: str = "auto",
) -> FusionOutput:
    """MOMEF, differentiable in `embeddings` and all weights; arguments as `fusion_reference`.

    Without `balance` the load-balance loss is left out, which spares a GPU three launches.

    Under autocast the op computes in, and `items` has, autocast's type.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named; on the CPU also negative
            counts.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    _check(embeddings, weights, present, top_k, counts)
    device, default = embeddings.device.type, weights.w1.dtype
    dtype = compute_dtype(device, default)
    modalities, inner, width = weights.w1.shape
    sizes = (f"modalities={modalities}", f"hidden={inner}", f"width={width}")
    choice = choose("fusion", device, dtype, sizes, backend)
    if choice.backend == "eager":
        output = fusion_reference(
            embeddings, weights, present=present, top_k=top_k, counts=counts, dtype=default
        )
        assert output.balance is not None
        of_router = output.balance.to(torch.promote_types(dtype, torch.float32)) if balance else None
        return FusionOutput(output.items.to(dtype), of_router)
    items, assigned, probability, *_ = _fusion(
        embeddings, list(weights), present, top_k, counts, dtype, choice.backend
    )
    return FusionOutput(items, modalities * (assigned * probability).sum() if balance else None)


def _check(
    embeddings: Tensor,
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
) -> None:
    check_weights(weights, FusionWeights)
    check_tensor("w1", weights.w1, (None, None, None), dtypes=FLOATS)
    modalities, expansion, width = weights.w1.shape
    if not (modalities and expansion and width):
        raise ValueError(f"w1: expected [M, f, d] with no side of 0, got {describe(weights.w1)}")
    check_tensor("embeddings", embeddings, (None, modalities, width), dtypes=FLOATS)
    count = embeddings.shape[0]
    check_tensor("router_weight", weights.router_weight, (modalities, modalities * width), dtypes=FLOATS)
    check_tensor("router_bias", weights.router_bias, (modalities,), dtypes=FLOATS)
    check_tensor("b1", weights.b1, (modalities, expansion), dtypes=FLOATS)
    check_tensor("w2", weights.w2, (modalities, width, expansion), dtypes=FLOATS)
    check_tensor("b2", weights.b2, (modalities, width), dtypes=FLOATS)
    if top_k is not None:
        check_integer("top_k", top_k, 1, modalities)
    for name, rows, shape, dtype in (
        ("present", present, (None, modalities), torch.bool),
        ("counts", counts, (None,), torch.int64),
    ):
        if rows is not None:
            check_tensor(name, rows, shape, dtypes=(dtype,))
            if rows.shape[0] != count:
                raise ValueError(f"{name}: expected {count} rows as in embeddings, got {describe(rows)}")
    if counts is not None:
        check_range("counts", counts, 0)


def _fake(embeddings, weights, present, top_k, counts, dtype):
    """Items, f `[M]`, P `[M]`; for the backward the router's logits `[N, M]`."""
    count, modalities, width = embeddings.shape
    wide, empty = torch.promote_types(dtype, torch.float32), embeddings.new_empty
    return [
        empty((count, width), dtype=dtype),
        empty((modalities,), dtype=wide),
        empty((modalities,), dtype=wide),
        empty((count, modalities), dtype=wide),
    ]


def _fake_backward(grad_items, grad_probability, logits, embeddings, weights, *rest):
    """Gradients of `embeddings`, then of `weights`."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (embeddings, *weights)]


def _keep(ctx, arguments, output):
    embeddings, weights, present, ctx.top_k, counts, ctx.dtype, ctx.backend = arguments
    items, assigned, probability, logits = output
    ctx.mark_non_differentiable(assigned, logits)
    ctx.save_for_backward(items, probability, present, counts, logits, embeddings, *weights)


def _backward(ctx, grad_items, _, grad_probability, *__):
    items, probability, present, counts, logits, embeddings, *weights = ctx.saved_tensors
    if grad_probability is None:
        by_triton = _passes.of(ctx.backend, "backward") == "triton"  # where an empty one spares a launch
        grad_probability = probability.new_empty(0) if by_triton else torch.zeros_like(probability)
    grad_embeddings, *grad_weights = _fusion_backward(
        torch.zeros_like(items) if grad_items is None else grad_items,
        grad_probability,
        logits,
        embeddings,
        weights,
        present,
        ctx.top_k,
        counts,
        ctx.dtype,
        ctx.backend,
    )
    return grad_embeddings, grad_weights, None, None


_COMMON = "Tensor embeddings, Tensor[] weights, Tensor? present, int? top_k, Tensor? counts, ScalarType dtype"
_fusion = define(f"fusion({_COMMON}) -> Tensor[]", _fake)
_fusion_backward = define(
    f"fusion_backward(Tensor grad_items, Tensor grad_probability, Tensor logits, {_COMMON}) -> Tensor[]",
    _fake_backward,
)
differentiate(_fusion, _keep, _backward)
