"""What a launch of the side network looks like: sources, groups of towers, tile sizes.

Towers of one width share a launch (a *group*). Tile sizes come from a table by (device class, rank, dtype,
size bucket), never from the exact number of items, so that a varying batch compiles nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossan_fast.kernels._blocks import cdiv
from crossan_fast.kernels._common import BEFORE_HOPPER, as_storage, power_of_two


class Source(NamedTuple):
    """One term of a tower's sums.

    Attributes:
        state: `[rows, L, D]`, unit stride in D.
        scale: fp32 `[rows, L]` or None.
        gathered: item ids choose the rows; else row i is the chunk's item i.
        modality: whose presence it needs; −1 always there.
    """

    state: Tensor
    scale: Tensor | None
    gathered: bool
    modality: int


class Tower(NamedTuple):
    """A tower in a launch: its number among all, sources in `coef`'s order, whose presence it needs."""

    number: int
    width: int
    sources: list[Source | None]
    exists: tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Towers that one launch serves: equal widths, and sources that a program can pick from.

    Either every tower reads the same sources in the same order (`static`, any mixture of stored types), or
    each picks its own at run time, for which all share a stored type.
    """

    towers: tuple[Tower, ...]

    @property
    def width(self) -> int:
        return self.towers[0].width

    @cached_property
    def slots(self) -> list[Source]:
        found: dict[tuple[int, bool], Source] = {}
        for tower in self.towers:
            for source in tower.sources:
                if source is not None:
                    found.setdefault((id(source.state), source.gathered), source)
        return list(found.values())

    @cached_property
    def table(self) -> tuple[tuple[int, ...], ...]:
        where = {(id(s.state), s.gathered): i for i, s in enumerate(self.slots)}
        return tuple(
            tuple(-1 if s is None else where[id(s.state), s.gathered] for s in tower.sources)
            for tower in self.towers
        )

    @property
    def static(self) -> bool:
        return len(set(self.table)) == 1

    @property
    def launchable(self) -> bool:
        kinds = {(s.state.dtype, s.scale is None, s.gathered) for s in self.slots}
        return self.static or len(kinds) == 1

    def pick(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The towers' own of one tensor per tower of the network."""
        return tuple(tensors[tower.number] for tower in self.towers)

    def read(self, ids: Tensor | None) -> tuple[Any, ...]:
        """Where sources are read: the first argument of `tiles.open_sources`."""
        return (
            tuple(as_storage(s.state) for s in self.slots),
            tuple(s.state.stride(0) for s in self.slots),
            tuple(s.state.stride(1) for s in self.slots),
            tuple(s.scale for s in self.slots),
            tuple(0 if s.scale is None else s.scale.stride(0) for s in self.slots),
            ids,
        )

    @property
    def constants(self) -> tuple[Any, ...]:
        """GROUP: TOWERS, SLOTS, COLUMNS, GATHERED, STATIC (`tiles.open_sources` has them), whose presence
        each tower needs, FIRST or SECOND."""
        return (
            self.numbers,
            tuple(slot for row in self.table for slot in row),
            tuple(-1 if s is None else s.modality for t in self.towers for s in t.sources),
            tuple(s.gathered for s in self.slots),
            self.static,
            tuple(t.exists[0] for t in self.towers),
            tuple(t.exists[1] for t in self.towers),
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """TOWERS: the towers' numbers in the network."""
        return tuple(t.number for t in self.towers)


def group_towers(towers: Sequence[Tower]) -> list[Group]:
    """As few launches as the towers allow: one per width, or one per tower where stored types differ."""
    groups = []
    for width in sorted({t.width for t in towers}):
        group = Group(tuple(t for t in towers if t.width == width))
        groups += [group] if group.launchable else [Group((t,)) for t in group.towers]
    return groups


# ------------------------------------------------------------------------------------------ tile sizes

# Accumulators that a program of 8 warps holds without spilling: all levels' z and e of one block of items;
# fp32 numbers. The rest of the register file is tiles in flight.
_ACCUMULATORS = 32_768


class Problem(NamedTuple):
    """All that a config depends on. `items` is a bucket's upper end, never an exact number of items."""

    device: str
    multiprocessors: int
    items: int
    towers: int
    levels: int
    sources: int
    width: int
    rank: int
    embedding: int
    dtype: torch.dtype
    stored_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ForwardConfig:
    """`fused` False: *down* and *walk* are launches of their own, *down* in `splits` parts of D."""

    fused: bool
    items: int
    columns: int
    walk_items: int
    levels: int
    splits: int
    span: int
    warps: int


@dataclass(frozen=True)
class GradientConfig:
    """Tiles of the weight gradients.

    Attributes:
        walk_items: *grad_walk*'s.
        items, columns, levels, splits, warps: *down_gradient*'s blocks, how many levels' shares a launch
            keeps, and how many ranges the items are cut into.
        mixing_items, mixing_rows, mixing_splits, mixing_warps, mixing_stages: *mixing_gradient*'s.
        mixing_registers: the most a thread of it may have, or None, where the assembler chooses.
        combine_columns: *combine*'s.
        combine_depth, combine_stages: how much of r *combine* multiplies at a time, and its pipeline; S of a
            wide r or d is what would not fit shared memory, and operands without matrix units registers.
    """

    walk_items: int
    items: int
    columns: int
    levels: int
    splits: int
    warps: int
    mixing_items: int
    mixing_rows: int
    mixing_splits: int
    mixing_warps: int
    mixing_stages: int
    mixing_registers: int | None
    combine_columns: int
    combine_depth: int
    combine_stages: int


def forward_config(problem: Problem) -> ForwardConfig:
    """Tiles of the forward pass.

    Large batches run fused: each weight crosses L2 once a block of items. A small one would leave most of the
    device idle that way, so *down* is split along D until every multiprocessor has a program.
    """
    br, be = power_of_two(problem.rank), power_of_two(problem.embedding)
    levels, towers, sms = problem.levels, problem.towers, problem.multiprocessors
    if problem.device == "interpreter":
        items, columns, budget = 16, 32, 16 * (br * 3 + be)
    elif problem.dtype == torch.float32:
        # No matrix instruction without tf32: products run on the vector units, operands wait in registers.
        items, columns, budget = 32, 16, _ACCUMULATORS // 4
    else:
        items, columns, budget = (32 if problem.device in BEFORE_HOPPER else 64), 32, _ACCUMULATORS
    while items > 16 and (levels * br + be) * items > budget:
        items //= 2
    group = max(1, min(levels, (budget // items - be) // br))
    columns = min(columns, power_of_two(problem.width))
    blocks = cdiv(problem.items, items)
    fused = group == levels and 2 * blocks * towers >= 3 * sms
    parts = cdiv(problem.width, columns)
    # Only whole divisors: every part is then the same number of full tiles.
    wanted = 1 if blocks * towers >= sms else cdiv(sms, max(1, blocks * towers))
    splits = next((s for s in range(min(wanted, parts), parts + 1) if parts % s == 0), parts)
    return ForwardConfig(
        fused=fused,
        items=items,
        columns=columns,
        walk_items=16,
        levels=group,
        splits=splits,
        span=cdiv(parts, splits) * columns,
        warps=4 if problem.device == "interpreter" else 8,
    )


def forward_candidates(problem: Problem) -> list[ForwardConfig]:
    """`forward_config`'s choice, then what autotuning may try instead."""
    first = forward_config(problem)
    others = [replace(first, items=first.items // 2, warps=4)] if first.items > 16 else []
    if first.levels == problem.levels:
        others.append(replace(first, fused=not first.fused))
    if not first.fused:
        others.append(replace(first, walk_items=32))
    return [first, *others]


def gradient_config(problem: Problem) -> GradientConfig:
    """Tiles of the weight gradients, and how many ranges the items are cut into.

    A range more fills the device better and adds a share of every weight to write and sum: the number of
    ranges minimises waves × (blocks a range + 2), the 2 being what writing a share costs in blocks.
    """
    br, be = power_of_two(problem.rank), power_of_two(problem.embedding)
    sms = problem.multiprocessors
    warps, half = 8, problem.dtype != torch.float32
    mixing_items, mixing_rows, mixing_warps, mixing_stages = 64, 64, 4, 3
    if problem.device == "interpreter":
        items, columns, budget, warps = 16, 32, 32 * (br * 3 + be), 4
        mixing_items, mixing_rows = 16, 32
    elif problem.dtype == torch.float32:
        items, columns, budget = 16, 16, _ACCUMULATORS // 10
        mixing_items, mixing_rows, mixing_stages = 32, 32, 2
    elif problem.device in BEFORE_HOPPER or 1 in problem.stored_bytes:  # decoding fp8 takes registers too
        items, columns, budget = 32, 16, _ACCUMULATORS // 4
    else:
        items, columns, budget = 32, 32, _ACCUMULATORS // 2
    if br > 64 and problem.device != "interpreter":
        mixing_warps = 8  # an accumulator of *mixing_gradient* is br columns wide
    group = max(1, min(problem.levels, (budget // columns - be) // br))
    blocks = cdiv(problem.items, items)
    programs = problem.towers * cdiv(problem.width, columns)

    def cost(splits: int) -> int:
        return cdiv(programs * splits, sms) * (cdiv(blocks, splits) + 2)

    # *mixing_gradient* has few programs, each with all items of its range to walk.
    tiles = problem.towers * problem.levels * cdiv(problem.levels * br + be, 2 * mixing_rows)
    return GradientConfig(
        walk_items=64 if half and problem.towers * cdiv(problem.items, 64) >= 2 * sms else 16,
        items=items,
        columns=columns,
        levels=group,
        splits=min(range(1, max(2, min(9, blocks + 1))), key=lambda s: (cost(s), s)),
        warps=warps,
        mixing_items=mixing_items,
        mixing_rows=mixing_rows,
        mixing_splits=max(1, min(cdiv(4 * sms, tiles), problem.items // 1024)),
        mixing_warps=mixing_warps,
        mixing_stages=mixing_stages,
        # Before Hopper the assembler spills a narrow r's for more programs a multiprocessor than there are.
        mixing_registers=128 if half and br <= 16 and problem.device in BEFORE_HOPPER else None,
        combine_columns=64 if half and problem.device not in BEFORE_HOPPER else 32,
        combine_depth=min(br if half else 16, 4096 // max(64, br, be)),
        combine_stages=3 if max(br, be) <= 64 else 1,
    )


def gradient_candidates(problem: Problem) -> list[GradientConfig]:
    """`gradient_config`'s choice, then what autotuning may try instead."""
    first = gradient_config(problem)
    splits = {max(1, first.splits // 2), first.splits, min(8, first.splits * 2)} - {first.splits}
    others = [replace(first, splits=s) for s in sorted(splits)]
    if first.items > 16:
        others.append(replace(first, items=first.items // 2, warps=4))
    others.append(replace(first, walk_items=64 if first.walk_items == 16 else 16))
    others.append(replace(first, mixing_splits=2 * first.mixing_splits))
    return [first, *others]
