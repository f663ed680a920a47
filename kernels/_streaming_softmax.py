"""Cross entropy of rows against columns that are never held as a matrix: what both losses share.

A row is a user vector, a column an item vector. Each kernel keeps one block of one side on chip and walks
the other side in blocks: the forward keeps a running maximum and sum per row, the backward recomputes the
logits from the saved log-sum-exp, once by rows (gradient of the users) and once by columns (gradient of the
items), so that every gradient has one owner and no atomics are needed. Long walks are split over programs
whose partial results are summed in a fixed order.

Two sets of columns and targets, told apart by `IN_BATCH`:
  * full: `slots` holds a target per row; every column but 0 counts once.
  * in batch: `slots [B, places]` holds the columns of each sequence; row b·(places−1)+s predicts
    slots[b, s+1]. Column u weighs counts[u] / exp(log_popularity[u]); columns of the row's own sequence are
    left out of the sum, to which the target is added back alone.

The own-sequence mask costs one comparison per place and logit if done per row. But the rows of a block
belong to few sequences: the comparisons are made per *sequence* and column, `[sequences, columns]`, and a
matrix product with the 0/1 membership `[rows, sequences]` carries −1e30 to the logits, as the accumulator
that ⟨user, item⟩ is added to. Blocks of columns that hold no own column skip the comparisons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_block, store_tile
from crossan_fast.kernels._common import dot, narrow, pick

# Not −inf: 0 · −inf in the membership product is NaN. Exact as "no weight": exp(−1e30 − finite) is 0.
BLOCKED = tl.constexpr(-1e30)

# Sizes that vary from batch to batch must not each compile a kernel of their own: `do_not_specialize` below.
# `width` stays specialised, as its divisibility decides how wide the loads are.


@triton.jit
def load_users(users, items, index_r, rows, width, BLOCK_D: tl.constexpr):
    """A block of users in the items' type, `[index_r, BLOCK_D]`."""
    user = load_block(users, index_r, rows, width, BLOCK_D)
    if user.dtype != items.dtype.element_ty:
        user = narrow(user.to(tl.float32), items.dtype.element_ty)
    return user


@triton.jit
def row_targets(slots, index_r, rows, places, IN_BATCH: tl.constexpr):
    """The column each row predicts, and whether there is one."""
    mask_r = index_r < rows
    if IN_BATCH:
        offset = (index_r // (places - 1)).to(tl.int64) * places + index_r % (places - 1)
        now = tl.load(slots + offset, mask=mask_r, other=0)
        target = tl.load(slots + offset + 1, mask=mask_r, other=0)
        return target, (now != 0) & (target != 0)
    target = tl.load(slots + index_r, mask=mask_r, other=0)
    return target, target != 0


@triton.jit
def column_bias(counts, log_popularity, index_c, columns, IN_BATCH: tl.constexpr):
    """What a column adds to its logits; −inf takes it out."""
    mask_c = index_c < columns
    if IN_BATCH:
        count = tl.load(counts + index_c, mask=mask_c, other=0).to(tl.float32)
        popularity = tl.load(log_popularity + index_c, mask=mask_c, other=0.0).to(tl.float32)
        bias = tl.log(tl.maximum(count, 1.0)) - popularity
        return tl.where(count > 0, bias, float("-inf"))
    return tl.where(mask_c & (index_c > 0), 0.0, float("-inf"))


@triton.jit
def sequence_slots(slots, first, sequences, places, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """The slots of `BLOCK_Q` sequences from `first` on, `[BLOCK_Q, BLOCK_S]`, −1 where there is none."""
    index_q = first + tl.arange(0, BLOCK_Q)
    index_s = tl.arange(0, BLOCK_S)
    mask = (index_q < sequences)[:, None] & (index_s < places)[None, :]
    offset = index_q.to(tl.int64)[:, None] * places + index_s[None, :]
    return tl.load(slots + offset, mask=mask, other=-1).to(tl.int32)


@triton.jit
def own_columns(slots, own, first, sequences, places, start, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """−1e30 where a column from `start` on occurs in a sequence, else 0: bf16 `[BLOCK_Q, BLOCK_C]`."""
    # Carried as numbers: a mask of single bits cannot change its layout through shared memory.
    blocked = tl.zeros([BLOCK_Q, BLOCK_C], dtype=tl.float32)
    hits = tl.sum(tl.sum(((own >= start) & (own < start + BLOCK_C)).to(tl.int32), axis=1), axis=0)
    if hits > 0:
        index_c = start + tl.arange(0, BLOCK_C)
        index_q = first + tl.arange(0, BLOCK_Q)
        pointer = slots + index_q.to(tl.int64) * places
        for place in range(places):
            slot = tl.load(pointer + place, mask=index_q < sequences, other=-1).to(tl.int32)
            blocked = tl.where(slot[:, None] == index_c[None, :], BLOCKED, blocked)
    return blocked.to(tl.bfloat16)


@triton.jit
def membership(index_r, first, places, BLOCK_Q: tl.constexpr):
    """1 where a row belongs to a sequence, `[rows, BLOCK_Q]`."""
    index_q = first + tl.arange(0, BLOCK_Q)
    belongs = (index_r // (places - 1))[:, None] == index_q[None, :]
    return tl.where(belongs, 1.0, 0.0).to(tl.bfloat16)


@triton.jit
def target_logits(
    users, items, log_popularity, target, valid, columns, width, IN_BATCH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(logits of the targets, their items); 0 where a row has no target."""
    item = load_block(items, tl.where(valid, target, columns), columns, width, BLOCK_D)
    logit = tl.sum(users.to(tl.float32) * item.to(tl.float32), axis=1)
    if IN_BATCH:
        logit -= tl.load(log_popularity + target, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, logit, 0.0), item


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "places", "part_length"])
def forward_kernel(
    users,
    items,
    slots,
    counts,
    log_popularity,
    maximum,
    total,
    positive,
    rows,
    columns,
    sequences,
    places,
    width,
    part_length,
    IN_BATCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running maximum and sum of one block of rows over one part of the columns."""
    part = tl.program_id(1)
    index_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    user = load_users(users, items, index_r, rows, width, BLOCK_D)  # [BR, d]
    target, valid = row_targets(slots, index_r, rows, places, IN_BATCH)
    own_logit, _ = target_logits(
        user, items, log_popularity, target, valid, columns, width, IN_BATCH, BLOCK_D
    )
    # The maximum starts at the target's logit, so it is finite in parts that hold no column of the row.
    top = own_logit
    sum_ = tl.zeros([BLOCK_R], dtype=tl.float32)
    if IN_BATCH:
        first = tl.program_id(0) * BLOCK_R // (places - 1)
        own = sequence_slots(slots, first, sequences, places, BLOCK_Q, BLOCK_S)  # [BQ, BS]
        member = membership(index_r, first, places, BLOCK_Q)  # [BR, BQ]
    start = part * part_length * BLOCK_C
    stop = tl.minimum(start + part_length * BLOCK_C, columns)
    if tl.sum(valid.to(tl.int32), axis=0) == 0:
        stop = start
    for begin in range(start, stop, BLOCK_C):
        index_c = begin + tl.arange(0, BLOCK_C)
        item = load_block(items, index_c, columns, width, BLOCK_D)  # [BC, d]
        logit = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)  # [BR, BC]
        if IN_BATCH:
            blocked = own_columns(slots, own, first, sequences, places, begin, BLOCK_Q, BLOCK_C)  # [BQ, BC]
            logit = dot(member, blocked, logit, PRECISION)
        logit = dot(user, tl.trans(item), logit, PRECISION)
        logit = logit + column_bias(counts, log_popularity, index_c, columns, IN_BATCH)[None, :]
        higher = tl.maximum(top, tl.max(logit, axis=1))
        sum_ = sum_ * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), axis=1)
        top = higher
    offset = part.to(tl.int64) * rows + index_r
    tl.store(maximum + offset, top, mask=index_r < rows)
    tl.store(total + offset, sum_, mask=index_r < rows)
    if part == 0:
        tl.store(positive + index_r, own_logit, mask=index_r < rows)


@triton.jit(do_not_specialize=["rows", "places", "parts"])
def combine_kernel(
    maximum,
    total,
    positive,
    slots,
    lse,
    partial,
    mean,
    rows,
    places,
    parts,
    IN_BATCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Join the parts of each row: log-sum-exp, +inf without a target; sums of loss and rows a program.

    One program alone writes the mean itself, as `mean_kernel` would.
    """
    index_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = index_r < rows
    _, valid = row_targets(slots, index_r, rows, places, IN_BATCH)
    logit = tl.load(positive + index_r, mask=mask_r, other=0.0)
    top = logit
    for part in range(parts):
        top = tl.maximum(
            top, tl.load(maximum + tl.cast(part, tl.int64) * rows + index_r, mask=mask_r, other=0.0)
        )
    sum_ = tl.exp(logit - top) if IN_BATCH else tl.zeros([BLOCK_R], dtype=tl.float32)
    for part in range(parts):
        offset = tl.cast(part, tl.int64) * rows + index_r
        here = tl.load(total + offset, mask=mask_r, other=0.0)
        sum_ += here * tl.exp(tl.load(maximum + offset, mask=mask_r, other=0.0) - top)
    log_sum = tl.log(tl.where(valid, sum_, 1.0))
    tl.store(lse + index_r, tl.where(valid, top + log_sum, float("inf")), mask=mask_r)
    loss = tl.where(valid, (top - logit) + log_sum, 0.0)
    sum_, count = tl.sum(loss, axis=0), tl.sum(valid.to(tl.float32), axis=0)
    if mean is not None:
        tl.store(mean, sum_ / tl.maximum(count, 1.0))
    else:
        tl.store(partial + 2 * tl.program_id(0), sum_)
        tl.store(partial + 2 * tl.program_id(0) + 1, count)


@triton.jit(do_not_specialize=["programs"])
def mean_kernel(partial, loss, programs, BLOCK: tl.constexpr):
    """The mean over rows with a target from every program's sums; 0 where there is none."""
    index = tl.arange(0, BLOCK)
    sum_ = tl.zeros([BLOCK], dtype=tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, programs, BLOCK):
        mask = begin + index < programs
        sum_ += tl.load(partial + 2 * (begin + index), mask=mask, other=0.0)
        count += tl.load(partial + 2 * (begin + index) + 1, mask=mask, other=0.0)
    tl.store(loss, tl.sum(sum_, axis=0) / tl.maximum(tl.sum(count, axis=0), 1.0))


@triton.jit(do_not_specialize=["rows", "places"])
def count_kernel(slots, counted, rows, places, IN_BATCH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows with a target in each program's share of the rows."""
    count = tl.zeros([BLOCK_R], dtype=tl.int32)
    for begin in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        _, valid = row_targets(slots, begin + tl.arange(0, BLOCK_R), rows, places, IN_BATCH)
        count += valid.to(tl.int32)
    tl.store(counted + tl.program_id(0), tl.sum(count, axis=0))


@triton.jit
def row_gradient(grad_loss, counted, COUNTERS: tl.constexpr):
    """d loss / d (one row's loss)."""
    count = tl.sum(tl.load(counted + tl.arange(0, COUNTERS)), axis=0)
    return tl.load(grad_loss).to(tl.float32) / tl.maximum(count, 1).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "places", "part_length"])
def backward_rows_kernel(
    grad_loss,
    counted,
    users,
    items,
    slots,
    counts,
    log_popularity,
    lse,
    coefficient,
    narrowed,
    grad_users,
    rows,
    columns,
    sequences,
    places,
    width,
    part_length,
    IN_BATCH: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one block of users over one part of the columns: Σ p·item − item[target].

    For the walk by columns `coefficient` takes what the target's own place adds to d logit, and `narrowed`,
    where users are wider than items, the users as they are multiplied.
    """
    part = tl.program_id(1)
    index_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    user = load_users(users, items, index_r, rows, width, BLOCK_D)  # [BR, d]
    if narrowed is not None:
        index_p = tl.where(part == 0, index_r, rows)  # by the first part alone
        store_tile(narrowed, index_p, rows, tl.arange(0, BLOCK_D), width, width, user)
    target, valid = row_targets(slots, index_r, rows, places, IN_BATCH)
    log_sum = tl.load(lse + index_r, mask=index_r < rows, other=float("inf"))
    gradient = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    if IN_BATCH:
        first = tl.program_id(0) * BLOCK_R // (places - 1)
        own = sequence_slots(slots, first, sequences, places, BLOCK_Q, BLOCK_S)  # [BQ, BS]
        member = membership(index_r, first, places, BLOCK_Q)  # [BR, BQ]
    start = part * part_length * BLOCK_C
    stop = tl.minimum(start + part_length * BLOCK_C, columns)
    if tl.sum(valid.to(tl.int32), axis=0) == 0:
        stop = start
    for begin in range(start, stop, BLOCK_C):
        index_c = begin + tl.arange(0, BLOCK_C)
        item = load_block(items, index_c, columns, width, BLOCK_D)  # [BC, d]
        logit = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)  # [BR, BC]
        if IN_BATCH:
            blocked = own_columns(slots, own, first, sequences, places, begin, BLOCK_Q, BLOCK_C)  # [BQ, BC]
            logit = dot(member, blocked, logit, PRECISION)
        logit = dot(user, tl.trans(item), logit, PRECISION)
        bias = column_bias(counts, log_popularity, index_c, columns, IN_BATCH)
        share = tl.exp((logit + bias[None, :]) - log_sum[:, None]) * SCALE  # [BR, BC]
        gradient = dot(share.to(item.dtype), item, gradient, PRECISION)
    gradient = gradient * (1.0 / SCALE)
    if part == 0:
        logit_of_target, item_of_target = target_logits(
            user, items, log_popularity, target, valid, columns, width, IN_BATCH, BLOCK_D
        )
        if IN_BATCH:
            missing = tl.where(valid, tl.exp(logit_of_target - log_sum) - 1.0, 0.0)
        else:
            missing = tl.where(valid, -1.0, 0.0)
        gradient += missing[:, None] * item_of_target.to(tl.float32)
        tl.store(coefficient + index_r, missing, mask=index_r < rows)
    store_block(
        grad_users, gradient, index_r, rows, width, part, grad_loss, counted, SPLIT, COUNTERS, BLOCK_D
    )


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "places", "part_length"])
def backward_columns_kernel(
    grad_loss,
    counted,
    users,
    items,
    slots,
    counts,
    log_popularity,
    lse,
    coefficient,
    narrowed,
    grad_items,
    rows,
    columns,
    sequences,
    places,
    width,
    part_length,
    IN_BATCH: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one block of items over one part of the rows: Σ d logit · user.

    Logits are computed transposed, so that they feed the second product from registers.
    """
    part = tl.program_id(1)
    begin_column = tl.program_id(0) * BLOCK_C
    index_c = begin_column + tl.arange(0, BLOCK_C)
    if narrowed is not None:
        users = narrowed
    item = load_block(items, index_c, columns, width, BLOCK_D)  # [BC, d]
    bias = column_bias(counts, log_popularity, index_c, columns, IN_BATCH)
    gradient = tl.zeros([BLOCK_C, BLOCK_D], dtype=tl.float32)
    start = part * part_length * BLOCK_R
    stop = tl.minimum(start + part_length * BLOCK_R, rows)
    for begin in range(start, stop, BLOCK_R):
        index_r = begin + tl.arange(0, BLOCK_R)
        logit = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)  # [BC, BR]
        if IN_BATCH:
            first = begin // (places - 1)
            own = sequence_slots(slots, first, sequences, places, BLOCK_Q, BLOCK_S)  # [BQ, BS]
            member = membership(index_r, first, places, BLOCK_Q)  # [BR, BQ]
            blocked = own_columns(slots, own, first, sequences, places, begin_column, BLOCK_Q, BLOCK_C)
            logit = dot(tl.trans(blocked), tl.trans(member), logit, PRECISION)
        user = load_block(users, index_r, rows, width, BLOCK_D)  # [BR, d]
        target, _ = row_targets(slots, index_r, rows, places, IN_BATCH)
        log_sum = tl.load(lse + index_r, mask=index_r < rows, other=float("inf"))
        missing = tl.load(coefficient + index_r, mask=index_r < rows, other=0.0) * SCALE
        logit = dot(item, tl.trans(user), logit, PRECISION)
        share = tl.exp((logit + bias[:, None]) - log_sum[None, :]) * SCALE  # [BC, BR]
        share += tl.where(index_c[:, None] == target[None, :], missing[None, :], 0.0)
        gradient = dot(share.to(user.dtype), user, gradient, PRECISION)
    gradient = gradient * (1.0 / SCALE)
    store_block(
        grad_items, gradient, index_c, columns, width, part, grad_loss, counted, SPLIT, COUNTERS, BLOCK_D
    )


@triton.jit
def store_block(
    out,
    gradient,
    index,
    size,
    width,
    part,
    grad_loss,
    counted,
    SPLIT: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a finished gradient, or the part of one that `sum_parts_kernel` finishes."""
    index_d = tl.arange(0, BLOCK_D)
    offset = index.to(tl.int64)[:, None] * width + index_d[None, :]
    if SPLIT:
        offset += tl.cast(part, tl.int64) * size * width
    else:
        gradient = gradient * row_gradient(grad_loss, counted, COUNTERS)
    mask = (index < size)[:, None] & (index_d < width)[None, :]
    tl.store(out + offset, narrow(gradient, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "parts", "second_size", "second_parts"])
def sum_parts_kernel(
    partials,
    grad_loss,
    counted,
    outs,
    size,
    parts,
    second_size,
    second_parts,
    COUNTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts of one gradient, or of two, in their order, and scale."""
    which = tl.program_id(1)
    partial = pick(partials, which)
    size = tl.where(which == 0, size, second_size)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_ = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(tl.where(which == 0, parts, second_parts)):
        sum_ += tl.load(partial + tl.cast(part, tl.int64) * size + index, mask=index < size, other=0.0)
    sum_ = sum_ * row_gradient(grad_loss, counted, COUNTERS)
    # The two may differ in type.
    if which == 0:
        tl.store(outs[0] + index, narrow(sum_, outs[0].dtype.element_ty), mask=index < size)
    else:
        last = outs[len(outs) - 1]
        tl.store(last + index, narrow(sum_, last.dtype.element_ty), mask=index < size)
