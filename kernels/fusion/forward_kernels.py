# mypy: disable-error-code="assignment"
"""fusion's forward kernels: the router and some experts of a block of items in one program, and their sum.

A program takes all experts of its items in turn, or, where items are too few to fill a GPU so, one of them:
each program then has its own part of the weighted sum, which `finish_kernel` adds up. The block's embeddings
e are read for the router, and again (out of L1) for the experts: M of them at once would not fit the
registers beside a tile of an expert. What a block adds to the load-balance statistics goes to its own row of
`partial`.

In every kernel SIZES are M, D, F, TOP_K (0: every expert) and BLOCKS the tiles' BLOCK_N, BLOCK_M, BLOCK_D,
BLOCK_F: items, modalities, an embedding's width and an expert's inner units; then EXPERTS, how many of them a
program takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import activate, dot, narrow, softmax


@triton.jit
def load_embedding(
    embeddings, present, index_n, count, m, index_d, M: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr
):
    """e of modality m `[BN, d]`, zeros where an item lacks it."""
    mask = index_n < count
    if present is not None:
        mask &= tl.load(present + index_n.to(tl.int64) * M + m, mask=mask, other=0) != 0
    pointer = embeddings + index_n.to(tl.int64)[:, None] * (M * D) + (m * D + index_d)[None, :]
    e = tl.load(pointer, mask=mask[:, None] & (index_d < D)[None, :], other=0.0)
    if e.dtype != DTYPE:
        e = narrow(e.to(tl.float32), DTYPE)
    return e


@triton.jit
def column_of(values, index_m, m):
    """Column m of `[BN, BM]`."""
    return tl.sum(tl.where(index_m[None, :] == m, values, 0.0), axis=1)


@triton.jit
def top(probability, exists, index_m, M: tl.constexpr, K: tl.constexpr):
    """The K most probable of the existing modalities, the first of equals: fewer than K surpass them."""
    own = tl.where(exists, probability, -1.0)
    surpassed = tl.zeros_like(own)
    for m in tl.static_range(M):
        other = column_of(own, index_m, m)[:, None]
        ahead = (other > own) | ((other == own) & (index_m[None, :] > m))
        surpassed += tl.where(ahead, 1.0, 0.0)
    return exists & (surpassed < K)


@triton.jit
def existing(present, index_n, count, index_m, M: tl.constexpr):
    """Which modalities an item has, `[BN, BM]`."""
    mask = (index_n < count)[:, None] & (index_m < M)[None, :]
    if present is not None:
        offset = index_n.to(tl.int64)[:, None] * M + index_m[None, :]
        return tl.load(present + offset, mask=mask, other=0) != 0
    return mask


@triton.jit
def route(logits, exists, index_m, M: tl.constexpr, TOP_K: tl.constexpr):
    """(router probabilities, chosen experts, their shares), each `[BN, BM]`; TOP_K 0 chooses all."""
    probability = softmax(logits, exists)
    if TOP_K == 0:
        return probability, exists, probability
    chosen = top(probability, exists, index_m, M, TOP_K)
    return probability, chosen, softmax(logits, chosen)


@triton.jit
def add_logits(
    logits, e, router_weight, index_d, index_m, M: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """logits `[BN, BM]` + e `[BN, d]` times one modality's columns of the router, `[M, d]` at M·d apart."""
    if e.dtype == tl.float32 and PRECISION == "ieee":
        # Without matrix instructions a product keeps d numbers of each operand in a thread, and spills.
        for m in tl.static_range(M):
            router = tl.load(router_weight + m * M * D + index_d, mask=index_d < D, other=0.0).to(tl.float32)
            logits += tl.where(index_m[None, :] == m, tl.sum(e * router[None, :], axis=1)[:, None], 0.0)
        return logits
    else:
        router = load_tile(router_weight, index_m, M, index_d, D, M * D).to(e.dtype)  # [BM, d]
        return dot(e, tl.trans(router), logits, PRECISION)


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    embeddings,
    router,
    experts,
    present,
    counts,
    router_logits,
    parts,
    partial,
    count,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits, statistics and `parts` [N, M / EXPERTS, d]: what each program's experts add to an item."""
    M: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    F: tl.constexpr = SIZES[2]
    TOP_K: tl.constexpr = SIZES[3]
    BLOCK_N: tl.constexpr = BLOCKS[0]
    BLOCK_M: tl.constexpr = BLOCKS[1]
    BLOCK_D: tl.constexpr = BLOCKS[2]
    BLOCK_F: tl.constexpr = BLOCKS[3]
    EXPERTS: tl.constexpr = BLOCKS[4]
    router_weight, router_bias = router
    w1, b1, w2, b2 = experts
    begin_m = tl.program_id(1) * EXPERTS
    index_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = index_n < count
    index_d = tl.arange(0, BLOCK_D)
    index_m = tl.arange(0, BLOCK_M)
    exists = existing(present, index_n, count, index_m, M)  # [BN, BM]

    logits = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)  # [BN, BM]
    for m in tl.static_range(M):
        e = load_embedding(embeddings, present, index_n, count, m, index_d, M, D, DTYPE)
        logits = add_logits(logits, e, router_weight + m * D, index_d, index_m, M, D, PRECISION)
    logits += tl.load(router_bias + index_m, mask=index_m < M, other=0.0).to(tl.float32)[None, :]
    probability, chosen, share = route(logits, exists, index_m, M, TOP_K)
    if begin_m == 0:
        offset = index_n.to(tl.int64)[:, None] * M + index_m[None, :]
        tl.store(router_logits + offset, logits, mask=mask_n[:, None] & (index_m < M)[None, :])
        weight = tl.where(tl.max(exists.to(tl.int32), axis=1) > 0, 1.0, 0.0)
        if counts is not None:
            weight *= tl.load(counts + index_n, mask=mask_n, other=0).to(tl.float32)
        assigned = chosen if TOP_K else top(probability, exists, index_m, M, 1)
        statistic = partial + tl.program_id(0) * 3 * BLOCK_M + index_m
        tl.store(statistic, tl.sum(tl.where(assigned, weight[:, None], 0.0), axis=0))
        tl.store(statistic + BLOCK_M, tl.sum(weight[:, None] * probability, axis=0))
        tl.store(statistic + 2 * BLOCK_M, tl.zeros([BLOCK_M], dtype=tl.float32) + tl.sum(weight, axis=0))

    item = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)  # [BN, d]
    for m in range(begin_m, begin_m + EXPERTS):
        runs = column_of(tl.where(chosen, 1.0, 0.0), index_m, m) > 0
        if tl.max(runs.to(tl.int32), axis=0) > 0:
            own = load_embedding(embeddings, present, index_n, count, m, index_d, M, D, DTYPE)  # [BN, d]
            bias = tl.load(b2 + m * D + index_d, mask=index_d < D, other=0.0).to(tl.float32)
            expert = own.to(tl.float32) + bias[None, :]  # [BN, d]
            for begin in range(0, F, BLOCK_F):
                index_f = begin + tl.arange(0, BLOCK_F)
                first = load_tile(w1 + m * F * D, index_f, F, index_d, D, D).to(DTYPE)  # [BF, d]
                inner = dot(own, tl.trans(first), tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32), PRECISION)
                inner += tl.load(b1 + m * F + index_f, mask=index_f < F, other=0.0).to(tl.float32)[None, :]
                inner = narrow(activate(inner, True), DTYPE)  # [BN, BF]
                second = load_tile(w2 + m * D * F, index_d, D, index_f, F, F).to(DTYPE)  # [d, BF]
                expert = dot(inner, tl.trans(second), expert, PRECISION)
            item += tl.where(runs[:, None], column_of(share, index_m, m)[:, None] * expert, 0.0)
    part = parts + tl.program_id(1) * D
    store_tile(part, index_n, count, index_d, D, (M // EXPERTS) * D, item)


@triton.jit(do_not_specialize=["programs", "count"])
def finish_kernel(
    partial,
    assigned,
    probability,
    programs,
    parts,
    items,
    count,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program 0: shares of assignments and mean probabilities `[M]`; the others sum `parts` `[N, M, d]`.

    Both from the programs' sums, in their order; `parts` None: items are there already.
    """
    if tl.program_id(0) == 0:
        index_m = tl.arange(0, BLOCK_M)
        index_p = tl.arange(0, BLOCK_P)
        sums = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
        means = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
        total = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
        for begin in range(0, programs, BLOCK_P):
            offset = (begin + index_p)[:, None] * 3 * BLOCK_M + index_m[None, :]
            mask = (begin + index_p < programs)[:, None] & (index_m < M)[None, :]
            sums += tl.load(partial + offset, mask=mask, other=0.0)
            means += tl.load(partial + offset + BLOCK_M, mask=mask, other=0.0)
            total += tl.load(partial + offset + 2 * BLOCK_M, mask=mask, other=0.0)
        sums_ = tl.sum(sums, axis=0)
        everything = tl.sum(sums_, axis=0)
        share = sums_ / tl.where(everything > 0, everything, 1.0)
        weight = tl.sum(total, axis=0)
        mean = tl.sum(means, axis=0) / tl.where(weight > 0, weight, 1.0)
        tl.store(assigned + index_m, share, mask=index_m < M)
        tl.store(probability + index_m, mean, mask=index_m < M)
    elif parts is not None:
        index_n = (tl.program_id(0) - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
        index_d = tl.arange(0, BLOCK_D)
        item = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for m in tl.static_range(M):
            item += load_tile(parts + m * D, index_n, count, index_d, D, M * D)
        store_tile(items, index_n, count, index_d, D, D, item)
