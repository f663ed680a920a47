# mypy: disable-error-code="assignment"
"""fusion's backward kernels: experts of items, the router, experts' weights, and the sum of weights' parts.

`items_kernel` sends the gradient back through the experts, a block of items and one expert or all a program
as in forward_kernels.py, which has SIZES and BLOCKS. `router_kernel` turns what each expert's share is worth
into the gradient of the router's logits, finishes the gradient of e and adds up the router's own. Weight
gradients are products over all items: a program owns one tile of a weight, keeps its sum in registers over
its part of the items, and recomputes what it needs of the experts from e, so that neither their inner units
`[N, M, 4d]` nor partial sums per block of items (0.5 MB each at the paper's size) cross memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossan_fast.kernels._blocks import load_tile, store_tile
from crossan_fast.kernels._common import activate, activate_grad, dot, narrow, pick, pick_constant
from crossan_fast.kernels.fusion.forward_kernels import (
    column_of,
    existing,
    load_embedding,
    route,
)


@triton.jit
def total_weight(present, counts, count, index_m, M: tl.constexpr):
    """What all items count in the load-balance statistics, at least fp32's smallest normal number."""
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        exists = existing(present, index, count, index_m, M)  # [BLOCK, BM]
        weight = tl.where(tl.max(exists.to(tl.int32), axis=1) > 0, 1.0, 0.0)
        if counts is not None:
            weight *= tl.load(counts + index, mask=index < count, other=0).to(tl.float32)
        total += weight
    return tl.maximum(tl.sum(total, axis=0), 1.1754943508222875e-38)


@triton.jit(do_not_specialize=["count"])
def items_kernel(
    grad_items,
    embeddings,
    router_logits,
    experts,
    present,
    grad_through,
    grad_shares,
    count,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What comes back through the experts: gradients of their e `[N, M, d]` and of their shares `[N, M]`."""
    M: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    F: tl.constexpr = SIZES[2]
    TOP_K: tl.constexpr = SIZES[3]
    BLOCK_N: tl.constexpr = BLOCKS[0]
    BLOCK_M: tl.constexpr = BLOCKS[1]
    BLOCK_D: tl.constexpr = BLOCKS[2]
    BLOCK_F: tl.constexpr = BLOCKS[3]
    EXPERTS: tl.constexpr = BLOCKS[4]
    w1, b1, w2, b2 = experts
    begin_m = tl.program_id(1) * EXPERTS
    index_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index_d = tl.arange(0, BLOCK_D)
    index_m = tl.arange(0, BLOCK_M)
    exists = existing(present, index_n, count, index_m, M)  # [BN, BM]
    logits = load_tile(router_logits, index_n, count, index_m, M, M)  # [BN, BM]
    _, chosen, share = route(logits, exists, index_m, M, TOP_K)
    grad = load_tile(grad_items, index_n, count, index_d, D, D).to(tl.float32)  # [BN, d]
    for m in range(begin_m, begin_m + EXPERTS):
        runs = column_of(tl.where(chosen, 1.0, 0.0), index_m, m) > 0
        grad_e = column_of(share, index_m, m)[:, None] * grad
        of_share = tl.zeros([BLOCK_N], dtype=tl.float32)
        if tl.max(runs.to(tl.int32), axis=0) > 0:
            e = load_embedding(embeddings, present, index_n, count, m, index_d, M, D, DTYPE)  # [BN, d]
            bias = tl.load(b2 + m * D + index_d, mask=index_d < D, other=0.0).to(tl.float32)
            expert = e.to(tl.float32) + bias[None, :]
            grad_expert = narrow(grad_e, DTYPE)
            for begin in range(0, F, BLOCK_F):
                index_f = begin + tl.arange(0, BLOCK_F)
                first = load_tile(w1 + m * F * D, index_f, F, index_d, D, D).to(DTYPE)  # [BF, d]
                second = load_tile(w2 + m * D * F, index_d, D, index_f, F, F).to(DTYPE)  # [d, BF]
                zero = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
                inner = dot(e, tl.trans(first), zero, PRECISION)  # [BN, BF]
                inner += tl.load(b1 + m * F + index_f, mask=index_f < F, other=0.0).to(tl.float32)[None, :]
                expert = dot(narrow(activate(inner, True), DTYPE), tl.trans(second), expert, PRECISION)
                grad_inner = dot(grad_expert, second, zero, PRECISION) * activate_grad(inner, True)
                grad_e = dot(narrow(grad_inner, DTYPE), first, grad_e, PRECISION)
            of_share = tl.where(runs, tl.sum(grad * expert, axis=1), 0.0)
        store_tile(grad_through + m * D, index_n, count, index_d, D, M * D, grad_e)
        tl.store(grad_shares + index_n.to(tl.int64) * M + m, of_share, mask=index_n < count)


@triton.jit(do_not_specialize=["count", "part_length"])
def router_kernel(
    grad_through,
    grad_shares,
    grad_probability,
    total,
    embeddings,
    router_logits,
    router_weight,
    present,
    counts,
    grad_embeddings,
    partial,
    count,
    part_length,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Over one part of the items: modality m's e, the router's weights of it, with m = 0 its bias."""
    M: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    TOP_K: tl.constexpr = SIZES[3]
    BLOCK_N: tl.constexpr = BLOCKS[0]
    BLOCK_M: tl.constexpr = BLOCKS[1]
    BLOCK_D: tl.constexpr = BLOCKS[2]
    m = tl.program_id(0)
    part = tl.program_id(1)
    index_d = tl.arange(0, BLOCK_D)
    index_m = tl.arange(0, BLOCK_M)
    router = load_tile(router_weight + m * D, index_m, M, index_d, D, M * D).to(DTYPE)  # [BM, d]
    weight = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    bias = tl.zeros([BLOCK_M], dtype=tl.float32)
    if grad_probability is not None:
        if total is None:
            everything = total_weight(present, counts, count, index_m, M)
        else:
            everything = tl.load(total)
        grad_mean = tl.load(grad_probability + index_m, mask=index_m < M, other=0.0).to(tl.float32)
    start = part * part_length * BLOCK_N
    for begin in range(start, tl.minimum(start + part_length * BLOCK_N, count), BLOCK_N):
        index_n = begin + tl.arange(0, BLOCK_N)
        mask_n = index_n < count
        exists = existing(present, index_n, count, index_m, M)  # [BN, BM]
        logits = load_tile(router_logits, index_n, count, index_m, M, M)  # [BN, BM]
        probability, _, share = route(logits, exists, index_m, M, TOP_K)
        grad_share = load_tile(grad_shares, index_n, count, index_m, M, M)  # [BN, BM]
        grad_logit = share * (grad_share - tl.sum(share * grad_share, axis=1)[:, None])
        if grad_probability is not None:  # the mean probabilities of the load-balance loss
            counted = tl.where(mask_n, 1.0, 0.0) / everything
            if counts is not None:
                counted *= tl.load(counts + index_n, mask=mask_n, other=0).to(tl.float32)
            grad_p = counted[:, None] * grad_mean[None, :]
            grad_logit += probability * (grad_p - tl.sum(probability * grad_p, axis=1)[:, None])
        grad_logit = narrow(grad_logit, DTYPE)  # [BN, BM]
        bias += tl.sum(grad_logit.to(tl.float32), axis=0)
        e = load_embedding(embeddings, present, index_n, count, m, index_d, M, D, DTYPE)  # [BN, d]
        weight = dot(tl.trans(grad_logit), e, weight, PRECISION)
        grad_e = load_tile(grad_through + m * D, index_n, count, index_d, D, M * D)  # [BN, d]
        grad_e = dot(grad_logit, router, grad_e, PRECISION)
        if present is not None:
            there = tl.load(present + index_n.to(tl.int64) * M + m, mask=mask_n, other=0) != 0
            grad_e = tl.where(there[:, None], grad_e, 0.0)
        store_tile(grad_embeddings + m * D, index_n, count, index_d, D, M * D, grad_e)
    base = partial + part.to(tl.int64) * (M * M * D + M)
    pointer = base + index_m[:, None] * (M * D) + (m * D + index_d)[None, :]
    tl.store(pointer, weight, mask=(index_m < M)[:, None] & (index_d < D)[None, :])
    if m == 0:
        tl.store(base + M * M * D + index_m, bias, mask=index_m < M)


@triton.jit(do_not_specialize=["count", "part_length"])
def experts_kernel(
    grad_items,
    embeddings,
    router_logits,
    experts,
    present,
    partial,
    count,
    part_length,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_F inner units of expert m over one part of the items: its w1, b1, w2, b2, one after the other."""
    M: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    F: tl.constexpr = SIZES[2]
    TOP_K: tl.constexpr = SIZES[3]
    BLOCK_N: tl.constexpr = BLOCKS[0]
    BLOCK_M: tl.constexpr = BLOCKS[1]
    BLOCK_D: tl.constexpr = BLOCKS[2]
    BLOCK_F: tl.constexpr = BLOCKS[3]
    w1, b1, w2 = experts[0], experts[1], experts[2]
    m = tl.program_id(1)
    part = tl.program_id(2)
    index_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    index_d = tl.arange(0, BLOCK_D)
    index_m = tl.arange(0, BLOCK_M)
    first = load_tile(w1 + m * F * D, index_f, F, index_d, D, D).to(DTYPE)  # [BF, d]
    second = load_tile(w2 + m * D * F, index_d, D, index_f, F, F).to(DTYPE)  # [d, BF]
    bias = tl.load(b1 + m * F + index_f, mask=index_f < F, other=0.0).to(tl.float32)
    grad_first = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    grad_second = tl.zeros([BLOCK_D, BLOCK_F], dtype=tl.float32)
    grad_b1 = tl.zeros([BLOCK_F], dtype=tl.float32)
    grad_b2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    start = part * part_length * BLOCK_N
    for begin in range(start, tl.minimum(start + part_length * BLOCK_N, count), BLOCK_N):
        index_n = begin + tl.arange(0, BLOCK_N)
        exists = existing(present, index_n, count, index_m, M)  # [BN, BM]
        logits = load_tile(router_logits, index_n, count, index_m, M, M)  # [BN, BM]
        _, chosen, share = route(logits, exists, index_m, M, TOP_K)
        runs = column_of(tl.where(chosen, 1.0, 0.0), index_m, m)
        if tl.max(runs, axis=0) > 0:
            e = load_embedding(embeddings, present, index_n, count, m, index_d, M, D, DTYPE)  # [BN, d]
            grad = load_tile(grad_items, index_n, count, index_d, D, D).to(tl.float32)  # [BN, d]
            grad *= column_of(share, index_m, m)[:, None]
            grad_b2 += tl.sum(grad, axis=0)
            grad_expert = narrow(grad, DTYPE)
            zero = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
            inner = dot(e, tl.trans(first), zero, PRECISION) + bias[None, :]
            active = narrow(activate(inner, True), DTYPE)  # [BN, BF]
            grad_second = dot(tl.trans(grad_expert), active, grad_second, PRECISION)
            grad_inner = dot(grad_expert, second, zero, PRECISION) * activate_grad(inner, True)
            grad_b1 += tl.sum(grad_inner, axis=0)
            grad_first = dot(tl.trans(narrow(grad_inner, DTYPE)), e, grad_first, PRECISION)
    base = partial + part.to(tl.int64) * (M * (2 * F * D + F + D))
    pointer = base + m * F * D + index_f[:, None] * D + index_d[None, :]
    tl.store(pointer, grad_first, mask=(index_f < F)[:, None] & (index_d < D)[None, :])
    base += M * F * D
    tl.store(base + m * F + index_f, grad_b1, mask=index_f < F)
    base += M * F
    pointer = base + m * D * F + index_d[:, None] * F + index_f[None, :]
    tl.store(pointer, grad_second, mask=(index_d < D)[:, None] & (index_f < F)[None, :])
    if tl.program_id(0) == 0:
        tl.store(base + M * D * F + m * D + index_d, grad_b2, mask=index_d < D)


@triton.jit(do_not_specialize=["router_parts", "experts_parts"])
def sum_kernel(
    router_partial,
    experts_partial,
    gradients,
    router_parts,
    experts_parts,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    ROUTER: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parts of gradients[i], BLOCK_P at a time; the first two are the router's, the rest experts'.

    A part is ROUTER or EXPERTS numbers long; in it a gradient begins at STARTS[i].
    """
    which = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index_p = tl.arange(0, BLOCK_P)
    size = pick_constant(SIZES, which)
    if tl.program_id(0) * BLOCK < size:
        start = pick_constant(STARTS, which)
        partial, parts, row = experts_partial, experts_parts, EXPERTS
        if which < 2:
            partial, parts, row = router_partial, router_parts, ROUTER
        sums = tl.zeros([BLOCK_P, BLOCK], dtype=tl.float32)
        for begin in range(0, parts, BLOCK_P):
            sums += load_tile(partial + start, begin + index_p, parts, index, size, row)
        target = pick(gradients, which)
        tl.store(target + index, narrow(tl.sum(sums, axis=0), target.dtype.element_ty), mask=index < size)
