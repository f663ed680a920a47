"""batch_rows in Triton: a launch forward, and one backward, in place of four of torch's each.

Backward a program owns an item: it looks through all places for its own, and adds up what they hold in their
order. P places and U items cost P · U comparisons, less than a launch takes for 704; torch's sum by sorted
places, which runs for more than `MOST`, is a dozen kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._blocks import cdiv, load_block, on_device, store_tile
from crossan_fast.kernels._common import launch, narrow, power_of_two

# Places beyond which looking through all of them for each item would take longer than sorting.
MOST = 4_096
# Rows of a program forward; numbers of a tile of places backward, 64 a thread.
_BLOCK_R, _TILE = 16, 8_192


@triton.jit(do_not_specialize=["count", "placed", "places"])
def forward_kernel(
    embeddings,
    slots,
    ids,
    popularity,
    columns,
    histories,
    by_place,
    real,
    log_popularity,
    count,
    placed,
    places,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of BLOCK_R items their columns, of as many places their rows."""
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    index_d = tl.arange(0, BLOCK_D)
    mask = index < count
    store_tile(
        columns, index, count, index_d, width, width, load_block(embeddings, index, count, width, BLOCK_D)
    )
    share = tl.load(popularity + tl.load(ids + index, mask=mask, other=0), mask=mask, other=1.0)
    logarithm = narrow(tl.log(share.to(tl.float32)), log_popularity.dtype.element_ty)
    tl.store(log_popularity + index, logarithm, mask=mask)
    mask = index < placed
    slot = tl.load(slots + index, mask=mask, other=0)
    row = load_block(embeddings, tl.where(mask, slot, count), count, width, BLOCK_D)  # [BR, d]
    store_tile(by_place, index, placed, index_d, width, width, row)
    # A place's history: all of its sequence's before it, and itself unless it is the last.
    place = index % places
    mask &= place < places - 1
    before = (index // places).to(tl.int64) * (places - 1) + place
    tl.store(real + before, (slot != 0).to(tl.uint8), mask=mask)
    offset = before[:, None] * width + index_d[None, :]
    tl.store(histories + offset, row, mask=mask[:, None] & (index_d < width)[None, :])


@triton.jit(do_not_specialize=["placed", "places"])
def backward_kernel(
    grad_columns,
    grad_histories,
    grad_by_place,
    slots,
    grad_embeddings,
    placed,
    places,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of one item's embedding."""
    item = tl.program_id(0)
    index_d = tl.arange(0, BLOCK_D)
    mask_d = index_d < width
    sum_ = tl.zeros([BLOCK_D], dtype=tl.float32)
    if grad_columns is not None:
        sum_ += tl.load(grad_columns + item.to(tl.int64) * width + index_d, mask=mask_d, other=0.0).to(
            tl.float32
        )
    for begin in range(0, placed, BLOCK_P):
        index = begin + tl.arange(0, BLOCK_P)
        own = tl.load(slots + index, mask=index < placed, other=-1) == item  # [BP]
        if tl.sum(own.to(tl.int32), axis=0) > 0:
            if grad_by_place is not None:
                offset = index.to(tl.int64)[:, None] * width + index_d[None, :]
                grad = tl.load(grad_by_place + offset, mask=own[:, None] & mask_d[None, :], other=0.0)
                sum_ += tl.sum(grad.to(tl.float32), axis=0)
            if grad_histories is not None:
                place = index % places
                before = (index // places).to(tl.int64) * (places - 1) + place
                there = own & (place < places - 1)
                offset = before[:, None] * width + index_d[None, :]
                grad = tl.load(grad_histories + offset, mask=there[:, None] & mask_d[None, :], other=0.0)
                sum_ += tl.sum(grad.to(tl.float32), axis=0)
    pointer = grad_embeddings + item.to(tl.int64) * width + index_d
    tl.store(pointer, narrow(sum_, grad_embeddings.dtype.element_ty), mask=mask_d)


def forward(embeddings: Tensor, slots: Tensor, ids: Tensor, popularity: Tensor) -> list[Tensor]:
    """Arguments and results as in the op's schema; see `batch_rows_reference`."""
    (count, width), (batch, places) = embeddings.shape, slots.shape
    embeddings = embeddings.contiguous()
    columns = torch.empty_like(embeddings)
    histories = embeddings.new_empty((batch, places - 1, width))
    by_place = embeddings.new_empty((batch, places, width))
    mask = slots.new_empty((batch, places - 1), dtype=torch.bool)
    log_popularity = popularity.new_empty(count)
    blocks = cdiv(max(count, slots.numel()), _BLOCK_R)
    with on_device(embeddings):
        if blocks and width:
            launch(
                forward_kernel,
                (blocks,),
                embeddings,
                slots.contiguous(),
                ids.contiguous(),
                popularity.contiguous(),
                columns,
                histories,
                by_place,
                mask.view(torch.uint8),
                log_popularity,
                count,
                slots.numel(),
                places,
                width,
                BLOCK_R=_BLOCK_R,
                BLOCK_D=power_of_two(width),
                num_warps=4,
            )
    return [columns, histories, by_place, mask, log_popularity]


def backward(
    grad_columns: Tensor | None,
    grad_histories: Tensor | None,
    grad_by_place: Tensor | None,
    slots: Tensor,
    count: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `embeddings` `[count, width]`, in `dtype`; None stands for a gradient of zeros."""
    if slots.numel() > MOST:
        return _by_sorting(grad_columns, grad_histories, grad_by_place, slots, (count, width)).to(dtype)
    grads = [None if g is None else g.contiguous() for g in (grad_columns, grad_histories, grad_by_place)]
    found = slots.new_empty((count, width), dtype=dtype)
    padded = power_of_two(width)
    with on_device(slots):
        if count and width:
            launch(
                backward_kernel,
                (count,),
                *grads,
                slots.contiguous(),
                found,
                slots.numel(),
                slots.shape[1],
                width,
                BLOCK_P=max(16, _TILE // padded),
                BLOCK_D=padded,
                num_warps=4,
            )
    return found


def _by_sorting(
    grad_columns: Tensor | None,
    grad_histories: Tensor | None,
    grad_by_place: Tensor | None,
    slots: Tensor,
    shape: tuple[int, int],
) -> Tensor:
    """The same in fp32 by torch's own ops, which repeat bit for bit, too."""
    total = torch.zeros(shape, device=slots.device, dtype=torch.float32)
    if grad_columns is not None:
        total += grad_columns
    for index, grad in ((slots[:, :-1], grad_histories), (slots, grad_by_place)):
        if grad is not None:
            total.index_put_((index,), grad.to(torch.float32), accumulate=True)
    return total
