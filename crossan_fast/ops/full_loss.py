"""full_loss: softmax over the whole catalogue (docs/mathematics.md), nothing masked but padding."""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast._checks import FLOATS, check_range, check_tensor, describe
from crossan_fast.ops._dispatch import choose, compute_dtype, without_autocast
from crossan_fast.ops._registration import define, differentiate, on_one_device


def full_loss_reference(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The definition, in plain torch, usable in float64.

    Args:
        users: `[..., d]`.
        items: `[I + 1, d]`; row 0 is padding and no candidate.
        targets: int64, the shape of `users` without d; 0 where a row has no target.

    Returns:
        The mean over rows with a target, a scalar; 0 where there is none.
    """
    users, targets = users.reshape(-1, users.shape[-1]), targets.reshape(-1)
    rows = targets != 0
    logits = users @ items[1:].T
    positive = logits.gather(1, (targets - 1).clamp_min(0)[:, None])[:, 0]
    loss = torch.logsumexp(logits, dim=1) - positive
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)


@on_one_device
def full_loss(users: Tensor, items: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """Softmax cross entropy over the catalogue; arguments as `full_loss_reference`.

    Differentiable in `users` and `items`. Under autocast both are read in autocast's type; sums are fp32
    (float64 for float64 inputs) on every backend, and so is the result.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named; on the CPU also targets out
            of range.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    if not isinstance(users, Tensor) or users.dim() < 1 or users.shape[-1] < 1:
        raise TypeError(f"users: expected a tensor [..., d] with d of at least 1, got {describe(users)}")
    check_tensor("users", users, users.shape, dtypes=FLOATS)
    device = users.device
    check_tensor("items", items, (None, users.shape[-1]), dtypes=FLOATS)
    if items.shape[0] < 2:
        raise ValueError(f"items: expected a padding row and at least one item, got {describe(items)}")
    check_tensor("targets", targets, (None,) * (users.dim() - 1), dtypes=(torch.int64,))
    if targets.shape != users.shape[:-1]:
        raise ValueError(f"targets: expected the shape of users without d, got {describe(targets)}")
    check_range("targets", targets, 0, items.shape[0] - 1)
    dtype = compute_dtype(device.type, torch.promote_types(users.dtype, items.dtype))
    users, items = users.reshape(-1, users.shape[-1]), items.to(dtype)
    choice = choose("full_loss", device.type, dtype, (), backend)
    if choice.backend != "triton":  # which narrows users as it reads them
        users = users.to(dtype)
    if choice.backend == "eager":
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(device.type):
            return full_loss_reference(users.to(wide), items.to(wide), targets)
    return _full_loss(users, items, targets.reshape(-1), choice.backend)[0]


def _fake(users, items, targets):
    """The loss, and each row's log-sum-exp `[R]` for the backward."""
    wide = torch.promote_types(users.dtype, torch.float32)
    return users.new_empty((), dtype=wide), users.new_empty(users.shape[:1], dtype=wide)


def _fake_backward(grad_loss, lse, users, items, targets):
    return users.new_empty(users.shape), items.new_empty(items.shape)


def _keep(ctx, arguments, output):
    *tensors, ctx.backend = arguments
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return None, None, None
    users, items = _full_loss_backward(grad_loss, *ctx.saved_tensors, ctx.backend)
    return users, items, None


_TENSORS = "Tensor users, Tensor items, Tensor targets"
_full_loss = define(f"full_loss({_TENSORS}) -> (Tensor, Tensor)", _fake)
_full_loss_backward = define(
    f"full_loss_backward(Tensor grad_loss, Tensor lse, {_TENSORS}) -> (Tensor, Tensor)", _fake_backward
)
differentiate(_full_loss, _keep, _backward)
