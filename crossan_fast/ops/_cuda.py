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


def _refuses_side_network(request: Request) -> str | None:
    """The limits of csrc/cuda/interface.h, each by its name; those of the device, once it is known."""
    given = dict(feature.split("=") for feature in request.features if "=" in feature)
    widths = [int(width) for width in given.get("widths", "").split(",") if width]
    cross, rank, levels = given.get("cross", "none"), int(given.get("rank", 8)), int(given.get("levels", 1))
    if cross == "side":
        return "walks every tower alone, which cross='side' rules out"
    if any(width % 64 for width in widths):
        return f"serves widths that are multiples of 64, not {widths}"
    if "unequal_pairs" in request.features:
        return f"serves pair towers of equal widths only, not {widths}"
    if cross == "backbone" and len(set(widths)) > 1:
        return f"adds other modalities' states at equal widths only, not {widths}"
    if len(widths) > (most := 4 if cross == "backbone" else 8):
        return f"serves at most {most} modalities with cross={cross!r}, not {len(widths)}"
    if levels > 8:
        return f"serves at most 8 levels, not {levels}"
    if rank > 64 or rank % 8:
        return f"serves bottlenecks that are multiples of 8 up to 64, not {rank}"
    if reason := _refuses(request, _SIXTEEN_BITS):
        return reason
    if widths and max(widths) > (widest := _ops().side_network_widest(levels)):
        return (
            f"keeps a tower in shared memory: with {levels} levels up to width {widest} on this GPU, "
            f"not {max(widths)}"
        )
    return None


def _ops() -> Any:
    _build.load("cuda")
    return torch.ops.crossan_fast_cuda


def _register(
    op: str,
    dtypes: tuple[torch.dtype, ...],
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    refuses: Callable[[Request], str | None] | None = None,
) -> None:
    refuses = refuses or (lambda request: _refuses(request, dtypes))
    register(op, "cuda", Implementation(forward, backward, refuses, _UNMEASURED))


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


def _refuses_fusion(request: Request) -> str | None:
    given = dict(feature.split("=") for feature in request.features if "=" in feature)
    width, hidden, modalities = (int(given.get(n, 8)) for n in ("width", "hidden", "modalities"))
    if width % 8 or width > 128:
        return f"serves item widths that are multiples of 8 up to 128, not {width}"
    if hidden % 8:
        return f"serves experts whose hidden units are a multiple of 8, not {hidden}"
    if modalities > 16:
        return f"serves at most 16 modalities, not {modalities}"
    return _refuses(request, _SIXTEEN_BITS)


def _fusion(
    hidden: Sequence[Tensor],
    weights: FusionWeights,
    present: Tensor | None,
    top_k: int | None,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Heads and router by torch's products, the routing and the chosen experts by csrc/cuda."""
    e = [
        F.linear(h.to(dtype), w.to(dtype), b.to(dtype))
        for h, w, b in zip(hidden, weights.head_weight, weights.head_bias, strict=True)
    ]
    if present is not None:
        e = [torch.where(present[:, m, None], x, 0) for m, x in enumerate(e)]
    joined = torch.cat(e, dim=1)
    logits = F.linear(joined.float(), weights.router_weight.float(), weights.router_bias.float())
    _, share, assigned, mean, _ = _route(logits, present, top_k, counts)
    items = _ops().experts_forward(joined, share, *weights[4:])
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
    through_experts, grad_share, *grad_experts = _ops().experts_backward(
        grad_items.to(dtype), joined, share, *weights[4:]
    )
    grad_logits = _ops().routing_backward(
        grad_share, grad_probability.float(), probability, share, _weights(counts), total
    )
    grad_joined = torch.addmm(through_experts, grad_logits, weights.router_weight.float()).to(dtype)
    grads = list(grad_joined.view(len(joined), len(hidden), weights.w1.shape[2]).unbind(1))
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
        *grad_experts,
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
_register("side_network", _SIXTEEN_BITS, _side_network, _side_network_backward, _refuses_side_network)
_register("fusion", _SIXTEEN_BITS, _fusion, _fusion_backward, _refuses_fusion)
