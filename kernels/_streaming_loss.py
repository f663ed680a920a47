"""Launches of the streaming softmax kernels, shared by in_batch_loss and full_loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossan_fast.kernels import _streaming_softmax as kernels
from crossan_fast.kernels._autotune import bucket, tuned
from crossan_fast.kernels._blocks import cdiv, on_device, split
from crossan_fast.kernels._common import (
    BEFORE_HOPPER,
    device_class,
    device_name,
    dot_precision,
    launch,
    power_of_two,
)

# Rows per program of the cheap per-row kernels, and programs that count rows.
_ROWS, _COUNTERS = 1024, 32
# Rows up to which a launch that narrows users costs more than reading them wide.
_FEW = 4096
# `Config.registers`: all that a thread can have, and what leaves room for three programs of 4 warps.
_ALL, _THIRD = 255, 168


@dataclass(frozen=True)
class Config:
    """Rows and columns of a tile, warps, pipeline stages, and registers a thread.

    Where `registers` is None the assembler chooses how many, and may spill to fit one program more on a
    multiprocessor; given a bound, it takes what it needs up to there.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


def config(device: str, dtype: torch.dtype, tf32: bool, width: int, backward: bool) -> Config:
    """The default tile: the widest whose kernels compile without a spill (benchmarks/results/aot.csv)."""
    if dtype == torch.float32 and not tf32:
        # Without matrix units a product keeps both operands in registers as well.
        if width > 64:
            return Config(16, 16, 4, 1)
        if device in BEFORE_HOPPER:
            return Config(32, 32, 8, 2)
        return Config(32, 32, 4, 2, None if backward else _THIRD)
    if width > 256:
        return Config(16, 16, 8, 1)
    if width > 128:
        return Config(32, 32, 8, 2)
    if width > 64:
        return Config(64, 32, 4, 2)
    if dtype == torch.float32:
        # TF32: operands take twice bf16's registers.
        if device == "sm_90":  # 64 columns give the walk by columns the rows of Hopper's own instruction
            return Config(64, 64, 8, 2) if backward else Config(64, 32, 4, 2)
        return Config(32, 32, 4, 2, _ALL) if backward else Config(64, 32, 4, 2, _THIRD)
    if not backward:
        return Config(64, 128, 4, 3)
    return Config(64, 64, 4, 3) if device == "sm_90" else Config(64, 32, 4, 2)


def candidates(device: str, dtype: torch.dtype, tf32: bool, width: int, backward: bool) -> list[Config]:
    """`config`'s choice, then what autotuning may try instead."""
    first = config(device, dtype, tf32, width, backward)
    others = [replace(first, warps=8 if first.warps == 4 else 4)]
    if first.columns > 32:
        others.append(replace(first, columns=first.columns // 2))
    if first.stages > 1:
        others.append(replace(first, stages=first.stages - 1))
    return [first, *others]


@dataclass(frozen=True)
class Problem:
    """One loss: rows `[R, d]`, columns `[C, d]`, and what says which column a row predicts.

    Attributes:
        users: `[R, d]`, contiguous, of the items' dtype or a wider one.
        items: `[C, d]`, contiguous, of the dtype to compute in.
        slots: int64, `[R]` targets, or `[B, places]` with R = B · (places − 1) where `counts` is given.
        counts: int64 `[C]`, or None for the full softmax.
        log_popularity: fp32 `[C]`, or None.
    """

    users: Tensor
    items: Tensor
    slots: Tensor
    counts: Tensor | None = None
    log_popularity: Tensor | None = None

    @staticmethod
    def of(users: Tensor, items: Tensor, *rest: Tensor) -> Problem:
        """From tensors of any strides, users `[..., d]`; `rest` is slots and what follows."""
        rows = users.reshape(-1, users.shape[-1])
        if rows.shape[0] > _FEW or torch.promote_types(rows.dtype, items.dtype) != rows.dtype:
            rows = rows.to(items.dtype)
        return Problem(rows.contiguous(), items.contiguous(), *(tensor.contiguous() for tensor in rest))

    @property
    def in_batch(self) -> bool:
        return self.counts is not None

    @property
    def places(self) -> int:
        return self.slots.shape[1] if self.in_batch else 0

    def config(self, run: Callable[[Config], object], backward: bool) -> Config:
        """The table's tile for this problem, or the one `run` is fastest with where autotuning is on."""
        device, dtype, (rows, width) = self.users.device, self.items.dtype, self.users.shape
        tf32 = dot_precision(dtype) == "tf32"
        sizes = (bucket(rows), bucket(self.items.shape[0]), self.places, width)
        choices = candidates(device_class(device), dtype, tf32, width, backward)
        return tuned("loss", (device_name(device), dtype, tf32, backward, *sizes), choices, run)

    def constants(self, tile: Config) -> dict[str, object]:
        # A block of rows starts anywhere in a sequence, so it may touch one more than it could fill.
        touched = cdiv(tile.rows - 1, self.places - 1) + 1 if self.in_batch else 1
        return {
            "IN_BATCH": self.in_batch,
            "BLOCK_R": tile.rows,
            "BLOCK_C": tile.columns,
            "BLOCK_D": power_of_two(self.users.shape[1]),
            "BLOCK_Q": power_of_two(touched),
            "BLOCK_S": power_of_two(self.places),
            "PRECISION": dot_precision(self.items.dtype),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        }

    def sizes(self) -> tuple[int, int, int, int, int]:
        """rows, columns, sequences, places, width: as the kernels take them."""
        return (
            self.users.shape[0],
            self.items.shape[0],
            self.slots.shape[0] if self.in_batch else 0,
            self.places,
            self.users.shape[1],
        )


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss, a scalar; log-sum-exp `[R]`, +inf where a row has no target), both fp32."""
    if problem.users.shape[0] == 0:
        return problem.users.new_zeros((), dtype=torch.float32), problem.users.new_empty(
            0, dtype=torch.float32
        )
    return _forward(problem.config(lambda tile: _forward(tile, problem), backward=False), problem)


def _forward(tile: Config, problem: Problem) -> tuple[Tensor, Tensor]:
    users = problem.users
    rows, columns, _, places, _ = problem.sizes()
    lse = users.new_empty(rows, dtype=torch.float32)
    blocks, programs = cdiv(rows, tile.rows), cdiv(rows, _ROWS)
    parts, length = split(blocks, cdiv(columns, tile.columns))
    # Two tensors: the second half of one starts at an address whose alignment, and so its kernel, varies.
    maximum, total = (users.new_empty((parts, rows), dtype=torch.float32) for _ in range(2))
    positive = users.new_empty(rows, dtype=torch.float32)
    partial = users.new_empty((programs, 2), dtype=torch.float32)
    loss = users.new_empty((), dtype=torch.float32)
    with on_device(users):
        launch(
            kernels.forward_kernel,
            (blocks, parts),
            users,
            problem.items,
            problem.slots,
            problem.counts,
            problem.log_popularity,
            maximum,
            total,
            positive,
            *problem.sizes(),
            length,
            **problem.constants(tile),
        )
        launch(
            kernels.combine_kernel,
            (programs,),
            maximum,
            total,
            positive,
            problem.slots,
            lse,
            partial,
            loss if programs == 1 else None,
            rows,
            places,
            parts,
            IN_BATCH=problem.in_batch,
            BLOCK_R=_ROWS,
        )
        if programs > 1:
            launch(kernels.mean_kernel, (1,), partial, loss, programs, BLOCK=_ROWS)
    return loss, lse


def backward(grad_loss: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of users and items, in their dtype."""
    if problem.users.shape[0] == 0:
        return torch.zeros_like(problem.users), torch.zeros_like(problem.items)
    tile = problem.config(lambda tile: _backward(tile, grad_loss, lse, problem), backward=True)
    return _backward(tile, grad_loss, lse, problem)


def _backward(tile: Config, grad_loss: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    users, items = problem.users, problem.items
    rows, columns, _, places, _ = problem.sizes()
    counted = users.new_empty(_COUNTERS, dtype=torch.int32)
    coefficient = users.new_empty(rows, dtype=torch.float32)
    narrowed = None if users.dtype == items.dtype else torch.empty_like(users, dtype=items.dtype)
    row_blocks, column_blocks = cdiv(rows, tile.rows), cdiv(columns, tile.columns)
    # A share of 1/2^20 is a subnormal number in fp16; times 2^14 it is not, and a share of 1 still fits.
    scale = 2.0**14 if items.dtype == torch.float16 else 1.0
    walks = (
        (kernels.backward_rows_kernel, users, row_blocks, column_blocks),
        (kernels.backward_columns_kernel, items, column_blocks, row_blocks),
    )
    gradients, sums = [], []
    with on_device(users):
        launch(
            kernels.count_kernel,
            (_COUNTERS,),
            problem.slots,
            counted,
            rows,
            places,
            IN_BATCH=problem.in_batch,
            BLOCK_R=_ROWS,
        )
        for kernel, like, blocks, loop_blocks in walks:
            parts, length = split(blocks, loop_blocks)
            gradient = torch.empty_like(like)
            partial = like.new_empty((parts, *like.shape), dtype=torch.float32) if parts > 1 else gradient
            launch(
                kernel,
                (blocks, parts),
                grad_loss,
                counted,
                users,
                items,
                problem.slots,
                problem.counts,
                problem.log_popularity,
                lse,
                coefficient,
                narrowed,
                partial,
                *problem.sizes(),
                length,
                SPLIT=parts > 1,
                SCALE=scale,
                COUNTERS=_COUNTERS,
                **problem.constants(tile),
            )
            if parts > 1:
                sums.append((partial, gradient))
            gradients.append(gradient)
        if sums:
            _sum_parts(sums, grad_loss, counted)
    return gradients[0], gradients[1]


def _sum_parts(sums: Sequence[tuple[Tensor, Tensor]], grad_loss: Tensor, counted: Tensor) -> None:
    """Of (parts, gradient), one pair or two, in one launch."""
    partials, gradients = zip(*sums, strict=True)
    (size, parts), (second_size, second_parts) = (
        (gradients[i].numel(), len(partials[i])) for i in (0, len(sums) - 1)
    )
    launch(
        kernels.sum_parts_kernel,
        (cdiv(max(size, second_size), _ROWS), len(sums)),
        partials,
        grad_loss,
        counted,
        gradients,
        size,
        parts,
        second_size,
        second_parts,
        COUNTERS=_COUNTERS,
        BLOCK=_ROWS,
    )
