"""Checks of states that are in memory, shared by writers and readers, and of ids that ask for rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossan_fast._checks import check_tensor, describe, nearest
from crossan_fast.cache.format import check_item_names, is_quantized
from crossan_fast.config import Modality

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STORED = (*FLOATS, torch.int8, torch.float8_e4m3fn)
_E4M3_NAN = 0x7F
# Integers of a type's width, and the least that no finite value has for its bits but the sign.
_PATTERNS = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float8_e4m3fn: (torch.uint8, _E4M3_NAN),
}


def check_ids(ids: Tensor, num_items: int) -> Tensor:
    """`ids`, after checking that they are int64 or int32 `[n]` and rows 0 to `num_items`."""
    check_tensor("ids", ids, ("n",), dtypes=(torch.int64, torch.int32))
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high > num_items:
            wrong = low if low < 0 else high
            raise IndexError(f"ids: expected rows 0 to {num_items}, got {wrong}")
    return ids


def nonfinite_rows(block: Tensor) -> Tensor:
    """bool `[n]`: which rows of `[n, ...]` hold NaN or inf. int8 has neither."""
    sound = torch.zeros(len(block), dtype=torch.bool, device=block.device)
    if block.dtype == torch.int8 or block.numel() == 0:
        return sound
    if is_quantized(block.dtype):
        # Without its sign e4m3's NaN is the largest code, and there is no inf; reductions know no float8.
        codes = block.view(torch.uint8).flatten(1) & _E4M3_NAN
        return codes.amax(dim=1) == _E4M3_NAN
    # One vectorised pass that NaN propagates through; isfinite is 20 times slower.
    if all(bound.isfinite() for bound in block.aminmax()):
        return sound
    return (block.flatten(1) * 0).sum(dim=1, dtype=torch.float32).isnan()  # finite · 0 = 0, the others NaN


def all_finite_alone(block: Tensor) -> bool:
    """Whether a dense block on the CPU holds neither NaN nor inf, asked by NumPy on one thread.

    For threads beside a training step: a parallel region of theirs would bring OpenMP a second team, and with
    more threads than cores every region of the step waits longer, for good.
    """
    if block.dtype == torch.int8 or block.numel() == 0:
        return True
    kind, top = _PATTERNS[block.dtype]
    without_sign = _E4M3_NAN if kind == torch.uint8 else torch.iinfo(kind).max
    return bool((block.reshape(-1).view(kind).numpy() & without_sign).max() < top)


def reject_nonfinite(
    block: Tensor,
    name: str,
    names: Sequence[str],
    first_row: int = 0,
    kept_as: str = "",
    *,
    what: str = "states",
    rows: Tensor | None = None,
    advice: str = "",
) -> None:
    """Raise if a row of `block` `[n, L, D]` (or `[n, L]`) has NaN or inf.

    Args:
        name: of the modality.
        names: those of rows 1..I.
        first_row: row k of the block is row `first_row + k` of the cache.
        kept_as: says after which conversion, where the input itself was finite.
        what: the argument's name.
        rows: the row of each of the block's, in place of `first_row`.
        advice: the message's end.
    """
    bad = nonfinite_rows(block).nonzero().flatten()
    if len(bad):
        place = int(bad[0])
        row = first_row + place if rows is None else int(rows[place])
        item = f"item {names[row - 1]!r}" if row else "the padding row"
        raise ValueError(
            f"{what}[{name!r}]: expected finite values, got NaN or inf{kept_as} in {len(bad)} "
            f"row{'s' if len(bad) > 1 else ''}, first in row {row} ({item}), "
            f"level {first_bad_level(block[place])}{advice}"
        )


def first_bad_level(row: Tensor) -> int:
    """The first level of `[L, D]` (or `[L]`) that has NaN or inf, counted from 0 among those kept."""
    return int(nonfinite_rows(row.reshape(len(row), -1)).nonzero()[0])


def checked_states(
    states: Mapping[str, Tensor], item_names: Sequence[str] | None
) -> tuple[tuple[Modality, ...], list[str]]:
    """Modalities of `{name: [I + 1, L, D_m]}` and the I names, after checking shapes, row 0 and names."""
    if not isinstance(states, Mapping) or not states:
        raise ValueError(
            f"states: expected at least one modality as {{name: [I + 1, L, D]}}, got {states!r}"[:300]
        )
    rows: int | None = None
    modalities = []
    for name, tensor in states.items():
        checked = check_tensor(
            f"states[{name!r}]", tensor, (rows if rows is not None else "I + 1", "L", f"D_{name}")
        )
        if len(checked) < 1:
            raise ValueError(f"states[{name!r}]: expected at least the padding row, got {describe(tensor)}")
        rows = len(checked)
        modalities.append(Modality(name, width=checked.shape[2], levels=checked.shape[1]))
        if bool((checked[0].float() != 0).any()):
            raise ValueError(f"states[{name!r}]: row 0 is padding and must be all zeros")
    assert rows is not None
    if item_names is None:
        return tuple(modalities), [str(row) for row in range(1, rows)]
    if isinstance(item_names, str | bytes):
        raise TypeError(f"item_names: expected a list of names, got {item_names!r}")
    names = list(item_names)
    if len(names) == rows and names[0] == "":
        names = names[1:]
    if len(names) != rows - 1:
        raise ValueError(f"item_names: expected {rows - 1} names (of rows 1 to {rows - 1}), got {len(names)}")
    check_item_names(names)
    return tuple(modalities), names


def checked_present(present: Tensor | None, modalities: Sequence[Modality], num_items: int) -> Tensor:
    """`present` bool `[I + 1, M]` with row 0 all False; all True from row 1 on where None is given."""
    shape = (num_items + 1, len(modalities))
    if present is None:
        flags = torch.ones(shape, dtype=torch.bool)
        flags[0] = False
        return flags
    flags = check_tensor("present", present, shape, dtypes=(torch.bool,)).cpu()
    if bool(flags[0].any()):
        raise ValueError("present: row 0 is padding and must be all False")
    return flags


def checked_stored(
    states: Mapping[str, Tensor],
    scales: Mapping[str, Tensor] | None,
    modalities: Sequence[Modality],
    names: Sequence[str],
) -> list[Tensor] | None:
    """`scales` in the order of `modalities`, after checking types, devices and values of both."""
    first = states[modalities[0].name]
    for name, tensor in states.items():
        check_tensor(f"states[{name!r}]", tensor, tensor.shape, dtypes=_STORED, device=first.device)
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"states[{name!r}]: expected {first.dtype} like the first, got {describe(tensor)}"
            )
        reject_nonfinite(tensor, name, names)
    if is_quantized(first.dtype) != (scales is not None):
        raise ValueError(f"scales: int8 and fp8 states need them and no others, got states of {first.dtype}")
    if scales is None:
        return None
    known = [m.name for m in modalities]
    for name in scales:
        if name not in known:
            raise ValueError(f"scales: unknown modality {name!r}, expected {known}{nearest(name, known)}")
    if missing := [name for name in known if name not in scales]:
        raise ValueError(f"scales: expected all of {known}, got none for {missing}")
    ordered = []
    for m in modalities:
        what, shape = f"scales[{m.name!r}]", (len(names) + 1, m.levels)
        ordered.append(
            check_tensor(what, scales[m.name], shape, dtypes=(torch.float32,), device=first.device)
        )
        reject_nonfinite(scales[m.name], m.name, names, what="scales")
    return ordered
