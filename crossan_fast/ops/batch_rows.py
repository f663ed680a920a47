"""batch_rows: what the sequence encoder and the in-batch loss read of a batch's distinct items.

On a GPU a step gathers rows by place, looks up popularity and adds up what both say of an item: small ops
that take their launches, not their work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossan_fast._checks import FLOATS, check_range, check_tensor, describe, refuse_gradient
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define, differentiate, on_one_device


class BatchRows(NamedTuple):
    """Attributes:
    columns: `[U, d]`, the embeddings, for the loss.
    histories: `[B, S, d]`, all places but the last, for the sequence encoder.
    by_place: `[B, S + 1, d]`.
    mask: bool `[B, S]`, True at the histories' real items.
    log_popularity: `[U]`.
    """

    columns: Tensor
    histories: Tensor
    by_place: Tensor
    mask: Tensor
    log_popularity: Tensor


def batch_rows_reference(embeddings: Tensor, slots: Tensor, ids: Tensor, popularity: Tensor) -> BatchRows:
    """The definition, in plain torch, usable in float64.

    Args:
        embeddings: `[U, d]`, row 0 padding.
        slots: int64 `[B, S + 1]`, the row of `embeddings` at each place, 0 at padding.
        ids: int64 `[U]`, each row's item.
        popularity: `[I + 1]`, each item's share of the training interactions.
    """
    # Histories are gathered as they are read: a part of `by_place` is copied, and so is its gradient.
    histories, by_place = embeddings[slots[:, :-1]], embeddings[slots]
    return BatchRows(embeddings, histories, by_place, slots[:, :-1] != 0, torch.log(popularity[ids]))


@on_one_device
def batch_rows(
    embeddings: Tensor, slots: Tensor, ids: Tensor, popularity: Tensor, *, backend: str = "auto"
) -> BatchRows:
    """Rows of a batch; arguments as `batch_rows_reference`. Differentiable in `embeddings`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named; a `popularity` that needs a
            gradient; on the CPU also slots and ids out of range.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    check_tensor("embeddings", embeddings, (None, None), dtypes=FLOATS)
    check_tensor("slots", slots, (None, None), dtypes=(torch.int64,))
    if slots.shape[1] < 1:
        raise ValueError(f"slots: expected [B, S + 1], got {describe(slots)}")
    check_tensor("ids", ids, embeddings.shape[:1], dtypes=(torch.int64,))
    check_tensor("popularity", popularity, (None,), dtypes=FLOATS)
    refuse_gradient("popularity", popularity)
    check_range("slots", slots, 0, embeddings.shape[0] - 1)
    check_range("ids", ids, 0, popularity.shape[0] - 1)
    choice = choose("batch_rows", embeddings.device.type, embeddings.dtype, (), backend)
    if choice.backend == "eager":
        return batch_rows_reference(embeddings, slots, ids, popularity)
    return BatchRows(*_batch_rows(embeddings, slots, ids, popularity, choice.backend))


def _fake(embeddings, slots, ids, popularity):
    batch, places = slots.shape
    width = embeddings.shape[1]
    return [
        embeddings.new_empty(embeddings.shape),
        embeddings.new_empty((batch, places - 1, width)),
        embeddings.new_empty((batch, places, width)),
        slots.new_empty((batch, places - 1), dtype=torch.bool),
        popularity.new_empty(ids.shape),
    ]


def _fake_backward(grad_columns, grad_histories, grad_by_place, slots, count, width, dtype):
    return slots.new_empty((count, width), dtype=dtype)


def _keep(ctx, arguments, output):
    embeddings, slots, _, _, ctx.backend = arguments
    ctx.like = (*embeddings.shape, embeddings.dtype)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(slots)


def _backward(ctx, columns, histories, by_place, *_):
    (slots,) = ctx.saved_tensors
    grad = _batch_rows_backward(columns, histories, by_place, slots, *ctx.like, ctx.backend)
    return grad, None, None, None


_batch_rows = define(
    "batch_rows(Tensor embeddings, Tensor slots, Tensor ids, Tensor popularity) -> Tensor[]", _fake
)
_batch_rows_backward = define(
    "batch_rows_backward(Tensor? grad_columns, Tensor? grad_histories, Tensor? grad_by_place, Tensor slots, "
    "int count, int width, ScalarType dtype) -> Tensor",
    _fake_backward,
)
differentiate(_batch_rows, _keep, _backward)
