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
from crossan_fast.kernels._common import as_storage, power_of_two


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
        return len(set(self.table)) == 1 and -1 not in self.table[0]

    @property
    def launchable(self) -> bool:
        kinds = {(s.state.dtype, s.scale is None, s.gathered) for s in self.slots}
        return self.static or len(kinds) == 1

    def pick(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The towers' own of one tensor per tower of the network."""
        return tuple(tensors[tower.number] for tower in self.towers)

    def tensors(self) -> dict[str, Any]:
        """The launch arguments that `open_sources` reads."""
        return {
            "states": tuple(as_storage(s.state) for s in self.slots),
            "row_strides": tuple(s.state.stride(0) for s in self.slots),
            "level_strides": tuple(s.state.stride(1) for s in self.slots),
            "scales": tuple(s.scale for s in self.slots),
            "scale_strides": tuple(0 if s.scale is None else s.scale.stride(0) for s in self.slots),
        }

    def constants(self) -> dict[str, Any]:
        return {
            "TOWERS": tuple(t.number for t in self.towers),
            "SLOTS": tuple(slot for row in self.table for slot in row),
            "COLUMNS": tuple(-1 if s is None else s.modality for t in self.towers for s in t.sources),
            "GATHERED": tuple(s.gathered for s in self.slots),
            "STATIC": self.static,
        }

    def existence(self) -> dict[str, Any]:
        return {
            "EXISTS_FIRST": tuple(t.exists[0] for t in self.towers),
            "EXISTS_SECOND": tuple(t.exists[1] for t in self.towers),
        }


def group_towers(towers: Sequence[Tower]) -> list[Group]:
    """As few launches as the towers allow: one per width, or one per tower where stored types differ."""
    groups = []
    for width in sorted({t.width for t in towers}):
        group = Group(tuple(t for t in towers if t.width == width))
        groups += [group] if group.launchable else [Group((t,)) for t in group.towers]
    return groups


# ------------------------------------------------------------------------------------------ tile sizes

# Accumulators that a program of 8 warps holds without spilling: all levels' z of one block of items, or all
# levels' shares of two weight gradients; fp32 numbers. The rest of the register file is tiles in flight.
_ACCUMULATORS = 28_672


@dataclass(frozen=True)
class ForwardConfig:
    """`fused` False: *down*, *walk* and *up* are launches of their own, *down* in `splits` parts of D."""

    fused: bool
    items: int
    columns: int
    up_columns: int
    walk_items: int
    levels: int
    splits: int
    span: int
    warps: int


@dataclass(frozen=True)
class GradientConfig:
    """Blocks of items, of columns, and how many levels' shares a launch keeps: of dW_down, then of dW_up."""

    items: int
    columns: int
    levels: int
    up_items: int
    up_columns: int
    up_levels: int
    splits: int
    warps: int


def forward_config(
    device: str, count: int, towers: int, levels: int, width: int, rank: int, dtype: torch.dtype, sms: int
) -> ForwardConfig:
    """Tiles of the forward pass, and of the products with g in the backward one.

    Large batches run fused: each weight crosses L2 once a block of items. A small one would leave most of the
    device idle that way, so *down* is split along D until every multiprocessor has a program.
    """
    br = power_of_two(rank)
    if device == "interpreter":
        items, columns, budget = 16, 32, 16 * br * 3
    elif dtype == torch.float32:
        # No matrix instruction without tf32: products run on the vector units, operands wait in registers.
        items, columns, budget = 32, 32, _ACCUMULATORS // 2
    else:
        items, columns, budget = 64, 32, _ACCUMULATORS
    while items > 16 and levels * br * items > budget:
        items //= 2
    group = max(1, min(levels, budget // (items * br)))
    columns = min(columns, power_of_two(width))
    blocks = cdiv(count, items)
    fused = group == levels and blocks * towers >= 2 * sms
    parts = cdiv(width, columns)
    # Only whole divisors: every part is then the same number of full tiles.
    wanted = 1 if blocks * towers >= sms else cdiv(sms, max(1, blocks * towers))
    splits = next((s for s in range(min(wanted, parts), parts + 1) if parts % s == 0), parts)
    span = cdiv(parts, splits) * columns
    walk_items = max(16, min(items, _ACCUMULATORS // (levels * br) // 16 * 16 or 16))
    walk_items = 1 << (walk_items.bit_length() - 1)
    return ForwardConfig(
        fused=fused,
        items=items,
        columns=columns,
        up_columns=min(64 if dtype != torch.float32 else 32, power_of_two(width)),
        walk_items=walk_items,
        levels=group,
        splits=splits,
        span=span,
        warps=4 if device == "interpreter" else 8,
    )


def forward_candidates(
    device: str, count: int, towers: int, levels: int, width: int, rank: int, dtype: torch.dtype, sms: int
) -> list[ForwardConfig]:
    """`forward_config`'s choice, then what autotuning may try instead."""
    first = forward_config(device, count, towers, levels, width, rank, dtype, sms)
    others = [replace(first, warps=4)]
    if first.levels == levels:
        others += [replace(first, fused=not first.fused), replace(first, fused=not first.fused, warps=4)]
    return [first, *others]


def gradient_config(
    device: str, count: int, towers: int, levels: int, width: int, rank: int, dtype: torch.dtype, sms: int
) -> GradientConfig:
    """Tiles of the weight gradients, and how many ranges the items are cut into.

    A range more fills the device better and adds a share of every weight to write and sum: the number of
    ranges minimises waves × (blocks a range + 2), the 2 being what writing a share costs in blocks.
    """
    br = power_of_two(rank)
    if device == "interpreter":
        items, up_items, columns, up_columns, budget = 16, 16, 32, 16, 32 * br * 3
    elif dtype == torch.float32:
        items, up_items, columns, up_columns, budget = 32, 32, 32, 32, _ACCUMULATORS // 4
    else:
        # 64 items would make every product a wgmma, and spills (aot.csv has what this choice costs).
        items, up_items, columns, up_columns, budget = 32, 64, 32, 32, _ACCUMULATORS // 2
    group = max(1, min(levels, budget // (br * columns)))
    up_group = max(1, min(levels, budget // (br * up_columns)))
    blocks = cdiv(count, up_items)
    programs = towers * cdiv(width, columns)

    def cost(splits: int) -> int:
        return cdiv(programs * splits, sms) * (cdiv(blocks, splits) + 2)

    splits = min(range(1, max(2, min(9, blocks + 1))), key=lambda s: (cost(s), s))
    return GradientConfig(
        items=items,
        columns=columns,
        levels=group,
        up_items=up_items,
        up_columns=up_columns,
        up_levels=up_group,
        splits=splits,
        warps=4 if device == "interpreter" else 8,
    )
