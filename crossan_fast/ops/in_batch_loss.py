"""in_batch_loss: IISAN's debiased in-batch softmax over a batch's distinct ids (docs/mathematics.md).

Row (b, s) with a real item at s predicts item[b, s+1]. With logit = ⟨user, item⟩ − log pop(item), U the
batch's distinct ids and n_u their counts,

    loss = −s_t + log( exp(s_t) + Σ_{u ∈ U, u ∉ sequence b} n_u · exp(s_u) ),        mean over rows

which is the cross entropy over every non-padding place of the batch, those masked whose id occurs in row b's
own sequence except the target's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast._checks import FLOATS, check_range, check_tensor, describe, refuse_gradient
from crossan_fast.ops._dispatch import choose, compute_dtype, without_autocast
from crossan_fast.ops._registration import define, differentiate, on_one_device
from crossan_fast.ops.deduplicate import Deduplicated


def in_batch_loss_reference(
    users: Tensor, items: Tensor, slots: Tensor, counts: Tensor, log_popularity: Tensor
) -> Tensor:
    """The definition over distinct ids, in plain torch, usable in float64.

    Args:
        users: `[B, S, d]`.
        items: `[U, d]`, row 0 padding.
        slots: int64 `[B, S+1]`, the row of `items` at each place, 0 at padding.
        counts: int64 `[U]`; 0 takes a row out of every sum.
        log_popularity: `[U]`, log of each item's share of the training interactions.

    Returns:
        The mean over rows with a target, a scalar; 0 where there is none.
    """
    logits = users @ items.T - log_popularity.to(users.dtype)
    target = slots[:, 1:]
    rows = (slots[:, :-1] != 0) & (target != 0)
    own = torch.zeros(slots.shape[0], items.shape[0], dtype=torch.bool, device=slots.device)
    own.scatter_(1, slots, True)
    negative = (logits + torch.log(counts.to(logits.dtype))).masked_fill(own[:, None, :], float("-inf"))
    positive = logits.gather(2, target[:, :, None])
    loss = torch.logsumexp(torch.cat([positive, negative], dim=2), dim=2) - positive[:, :, 0]
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)


def refuse_without_negatives(item_ids: Tensor, unique: Deduplicated) -> None:
    """Raise where no row of a batch has a negative: its loss is 0 whatever the model, and nothing learns.

    Args:
        item_ids: `[B, S+1]`, left-padded with 0.
        unique: `deduplicate(item_ids)`, without a capacity.
    """
    if torch.compiler.is_compiling():
        return
    distinct = unique.ids.numel() - 1
    if distinct > item_ids.shape[1]:  # more than one sequence holds
        return
    ordered = item_ids[item_ids[:, -2] != 0].sort(dim=1).values
    own = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + (ordered[:, 0] != 0)
    if bool((own == distinct).all()):
        raise ValueError(
            "item_ids: expected items of other sequences as negatives for loss 'in_batch', got none: each of "
            f"the {len(own)} with a target holds all {distinct} distinct items of the batch"
        )


@on_one_device
def in_batch_loss_by_place(users: Tensor, items: Tensor, item_ids: Tensor, log_popularity: Tensor) -> Tensor:
    """The same loss with a column for every place of the batch, as IISAN states it.

    Args:
        users: `[B, S, d]`.
        items: `[B, S+1, d]`.
        item_ids: `[B, S+1]`, 0 at padding.
        log_popularity: `[B, S+1]`.
    """
    batch, places = item_ids.shape
    flat = item_ids.reshape(-1)
    logits = users @ items.reshape(batch * places, -1).T - log_popularity.reshape(-1).to(users.dtype)
    own = (item_ids[:, :, None] == flat).any(dim=1)
    blocked = (own | (flat == 0))[:, None, :].repeat(1, places - 1, 1)
    place = torch.arange(batch * places, device=item_ids.device).reshape(batch, places)[:, 1:]
    blocked.scatter_(2, place[:, :, None], False)
    rows = (item_ids[:, :-1] != 0) & (item_ids[:, 1:] != 0)
    logits = logits.masked_fill(blocked, float("-inf"))
    loss = torch.logsumexp(logits, dim=2) - logits.gather(2, place[:, :, None])[:, :, 0]
    return torch.where(rows, loss, 0).sum() / rows.sum().clamp_min(1)


@on_one_device
def in_batch_loss(
    users: Tensor,
    items: Tensor,
    slots: Tensor,
    counts: Tensor,
    log_popularity: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The debiased in-batch softmax over distinct ids; arguments as `in_batch_loss_reference`.

    Differentiable in `users` and `items`; `log_popularity` gets no gradient. Under autocast the two are read
    in autocast's type; sums are fp32 (float64 for float64 inputs) on every backend, and so is the result.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named; a `log_popularity` that needs
            a gradient; on the CPU also slots out of range and negative counts.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    check_tensor("users", users, (None, None, None), dtypes=FLOATS)
    if users.shape[2] < 1:
        raise ValueError(f"users: expected [B, S, d] with d of at least 1, got {describe(users)}")
    device = users.device
    check_tensor("items", items, (None, users.shape[2]), dtypes=FLOATS)
    check_tensor("slots", slots, (None, None), dtypes=(torch.int64,))
    if slots.shape[0] != users.shape[0] or slots.shape[1] != users.shape[1] + 1:
        raise ValueError(f"slots: expected [B, S + 1] to users' [B, S, d], got {describe(slots)}")
    check_tensor("counts", counts, (None,), dtypes=(torch.int64,))
    check_tensor("log_popularity", log_popularity, (None,), dtypes=FLOATS)
    refuse_gradient("log_popularity", log_popularity)
    for name, column in (("counts", counts), ("log_popularity", log_popularity)):
        if column.shape[0] != items.shape[0]:
            raise ValueError(f"{name}: expected an entry for each row of items, got {describe(column)}")
    check_range("slots", slots, 0, items.shape[0] - 1)
    check_range("counts", counts, 0)
    dtype = compute_dtype(device.type, torch.promote_types(users.dtype, items.dtype))
    items = items.to(dtype)
    choice = choose("in_batch_loss", device.type, dtype, (), backend)
    if choice.backend != "triton":  # which narrows users as it reads them
        users = users.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if choice.backend == "eager":
        with without_autocast(device.type):
            return in_batch_loss_reference(users.to(wide), items.to(wide), slots, counts, log_popularity)
    return _in_batch_loss(users, items, slots, counts, log_popularity.to(wide), choice.backend)[0]


def _fake(users, items, slots, counts, log_popularity):
    """The loss, and each row's log-sum-exp `[B, S]` for the backward."""
    wide = torch.promote_types(users.dtype, torch.float32)
    return users.new_empty((), dtype=wide), users.new_empty(users.shape[:2], dtype=wide)


def _fake_backward(grad_loss, lse, users, items, *rest):
    return users.new_empty(users.shape), items.new_empty(items.shape)


def _keep(ctx, arguments, output):
    *tensors, ctx.backend = arguments
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return (None,) * 5
    users, items = _in_batch_loss_backward(grad_loss, *ctx.saved_tensors, ctx.backend)
    return users, items, None, None, None


_TENSORS = "Tensor users, Tensor items, Tensor slots, Tensor counts, Tensor log_popularity"
_in_batch_loss = define(f"in_batch_loss({_TENSORS}) -> (Tensor, Tensor)", _fake)
_in_batch_loss_backward = define(
    f"in_batch_loss_backward(Tensor grad_loss, Tensor lse, {_TENSORS}) -> (Tensor, Tensor)", _fake_backward
)
differentiate(_in_batch_loss, _keep, _backward)
