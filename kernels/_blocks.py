"""Blocks of rows: how a kernel loads one, and over how many programs a walk over many is split."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossan_fast.kernels._common import narrow

# Programs that fill a large GPU about twice over (an H100 has 132 multiprocessors). A constant rather than a
# device query: a loop is split the same way, and so rounds the same way, on every card.
PROGRAMS = 264


@triton.jit
def load_block(matrix, index, size, width, BLOCK_D: tl.constexpr):
    """Rows `index` of a contiguous matrix, `[index, BLOCK_D]`; int64 offsets, as 2^20 · d may pass 2^31."""
    index_d = tl.arange(0, BLOCK_D)
    offset = index.to(tl.int64)[:, None] * width + index_d[None, :]
    return tl.load(matrix + offset, mask=(index < size)[:, None] & (index_d < width)[None, :], other=0.0)


@triton.jit
def load_tile(matrix, index_i, rows, index_j, columns, stride):
    """A block `[index_i, index_j]` of a matrix, zeros outside; int64 offsets."""
    mask = (index_i < rows)[:, None] & (index_j < columns)[None, :]
    return tl.load(matrix + index_i.to(tl.int64)[:, None] * stride + index_j[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(matrix, index_i, rows, index_j, columns, stride, x):
    """x `[index_i, index_j]` into a matrix, in its type; what lies outside is left out; int64 offsets."""
    mask = (index_i < rows)[:, None] & (index_j < columns)[None, :]
    pointer = matrix + index_i.to(tl.int64)[:, None] * stride + index_j[None, :]
    if x.dtype != matrix.dtype.element_ty:
        x = narrow(x, matrix.dtype.element_ty)
    tl.store(pointer, x, mask=mask)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's own GPU, whichever is current; nothing to do for the interpreter on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def split(fixed_blocks: int, loop_blocks: int) -> tuple[int, int]:
    """(parts, blocks per part) of a loop that every one of `fixed_blocks` programs would walk alone.

    Few fixed blocks leave multiprocessors idle, so their loop is cut into parts whose results are summed
    after; partial results never take more than `PROGRAMS` blocks of memory.
    """
    parts = max(1, min(loop_blocks, PROGRAMS // max(fixed_blocks, 1)))
    length = cdiv(loop_blocks, parts)
    return max(1, cdiv(loop_blocks, max(length, 1))), length
