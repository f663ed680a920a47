"""States that were computed elsewhere, by item: arrays, safetensors, torch files, one file an item.

    .npy             floats [I, D] or [I, L, D]
    .safetensors     one tensor [I, D] or [I, L, D]; or a tensor [D] or [L, D] an item, by its name
    .pt, .pth        a tensor, or {item name: tensor}, or a list of tensors; read with `weights_only=True`
    a folder         of .pt, .pth or .npy files, one an item, called by its name (IISAN's)

Which item a row is, its ids file says: MMRec's mapping (`i_id_mapping.csv`: a column of names and one of row
numbers, from 0 or from 1), an items file in the order of the rows, or a name a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast._checks import describe
from crossan_fast.cache.build.inputs import BrokenInput
from crossan_fast.data._open import open_table
from crossan_fast.data._table import Table
from crossan_fast.data._values import as_list, name_of
from crossan_fast.data.columns import NAMES
from crossan_fast.data.items import read_items

Array = npt.NDArray[Any]

_TORCH = (".pt", ".pth")
_NUMBERS = ("row", "index", "number")
_SHOWN = 3


@dataclass(frozen=True)
class Features:
    """One modality's states, a row an item.

    Attributes:
        source: for messages.
        rows: how many.
        shape: L, D.
        dtype: for messages.
        names: of the rows; None where nothing says which item is which.
        ids: what the ids file was taken for; empty where there is none.
        read: floats `[L, D]` of a row. Raises `BrokenInput`.
    """

    source: Path
    rows: int
    shape: tuple[int, int]
    dtype: str
    names: list[str] | None
    read: Callable[[int], Array]
    ids: str = ""


@dataclass(frozen=True)
class Matched:
    """How items and rows of features found each other.

    Attributes:
        rows: the row of each item, −1 where it has none.
        by: `name` or `order`.
        without: names of items that have no row.
        unused: names of rows that are no item's.
    """

    rows: npt.NDArray[np.int64]
    by: str
    without: list[str]
    unused: list[str]

    def __str__(self) -> str:
        found = len(self.rows) - len(self.without)
        parts = [f"{found:,} of {len(self.rows):,} items matched by {self.by}"]
        for what, names in (("items without features", self.without), ("rows of no item", self.unused)):
            if names:
                parts.append(f"{len(names):,} {what}, such as {', '.join(map(repr, names[:_SHOWN]))}")
        return "; ".join(parts)


def open_features(source: Path, ids: Path | None, where: str) -> Features:
    """Features of any form above; nothing is read but shapes and names.

    Args:
        ids: which item each row is; not for forms that have names of their own.
        where: the beginning of messages.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another format or shape, names twice, or an ids file of another length.
    """
    if source.is_dir():
        found = _open_folder(source, where)
    elif not source.is_file():
        raise FileNotFoundError(f"{where}: no such file: {source}")
    elif source.suffix == ".safetensors":
        found = _open_safetensors(source, where)
    elif source.suffix in _TORCH:
        found = _open_torch(source, where)
    else:
        found = _open_array(source, where)
    if ids is not None:
        if found.names is not None:
            raise ValueError(f"{where}: {source} has names of its own, expected no ids file, got {ids}")
        names, taken_for = read_ids(ids, found.rows, where)
        found = replace(found, names=names, ids=taken_for)
    if found.names is not None and len(set(found.names)) < len(found.names):
        twice = next(name for name in found.names if found.names.count(name) > 1)
        raise ValueError(f"{where}: item {twice!r} has more than one row of {source}")
    return found


def read_ids(path: Path, rows: int, where: str) -> tuple[list[str], str]:
    """The name of each of so many rows of features, from an ids file, and what that was taken for.

    Raises:
        ValueError: it names another number of rows, or two of its columns could number them and disagree.
    """
    table = open_table(path, "ids", {*NAMES["item"], *_NUMBERS})
    if table.width == 1:
        cells = [cell for chunk in table.chunks([0]) for cell in as_list(chunk.cells[0])]
        names, said = [name_of(cell) for cell in cells], "names in the order of the rows"
    elif (mapped := _mapping(table, rows, where)) is not None:
        names, said = mapped
    else:
        items = read_items(path)
        names, said = items.names, f"items in the order of the rows, {items.taken_for.partition(': ')[2]}"
    if len(names) != rows:
        raise ValueError(
            f"{where}: expected {rows} items in {path}, one a row of the features, got {len(names)}"
        )
    return names, f"{path}: {said}"


def match(features: Features, names: Sequence[str], where: str) -> Matched:
    """Find each item's row, by name, or by order where the features have no names.

    Raises:
        ValueError: no item has a row, or, without names, another number of rows than of items.
    """
    if features.names is None:
        if features.rows != len(names):
            raise ValueError(
                f"{where}: expected floats [{len(names)}, L, D], a row for each item of the items file, got "
                f"{features.dtype} {[features.rows, *features.shape]} in {features.source} "
                "(an ids file says which item each row is: ids=FILE)"
            )
        return Matched(np.arange(len(names)), "order", [], [])
    place = {name: row for row, name in enumerate(features.names)}
    rows = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    without = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    if len(without) == len(names):
        raise ValueError(
            f"{where}: none of {len(names)} items has a row in {features.source}: items are called "
            f"{', '.join(map(repr, names[:_SHOWN]))}, rows {', '.join(map(repr, features.names[:_SHOWN]))}"
        )
    known = set(names)
    return Matched(rows, "name", without, [name for name in features.names if name not in known])


@dataclass(frozen=True)
class _Reading:
    """One way to read a table of names and row numbers."""

    number: str
    name: str
    names: list[str]
    in_file_order: bool
    first: int


def _mapping(table: Table, rows: int, where: str) -> tuple[list[str], str] | None:
    """Names by row of a table with a column of each, and which is which; None where none numbers the rows.

    Where two columns could: the one called row, index or number; else the one that counts the file's lines,
    as an index does that was written with a frame.
    """
    found = _readings(table, rows)
    if not found:
        return None
    for rule in (
        lambda reading: reading.number in _NUMBERS,
        lambda reading: reading.in_file_order and reading.first == 0,
        lambda reading: reading.in_file_order,
    ):
        if len({tuple(reading.names) for reading in found}) > 1:
            found = [reading for reading in found if rule(reading)] or found
    best = found[-1]  # of equals; MMRec's are `asin, itemID`
    if any(reading.names != best.names for reading in found):
        either = " or ".join(repr(reading.number) for reading in found)
        raise ValueError(
            f"{where}: {table.source}: expected one column of row numbers, got {either}, which both number "
            f"the {rows} rows and disagree; call the right one 'row' in the file's header"
        )
    return best.names, f"row numbers in column {best.number!r}, names in {best.name!r}"


def _readings(table: Table, rows: int) -> list[_Reading]:
    """Every column that holds each of the rows' numbers once, from 0 or from 1, beside one of names."""
    if table.header is None or table.width < 2:
        return []
    columns: list[list[Any]] = [[] for _ in range(table.width)]
    for chunk in table.chunks(range(table.width)):
        for column, cells in zip(columns, chunk.cells, strict=True):
            column.extend(map(name_of, as_list(cells)))
    found = []
    for place in range(table.width):
        named = [o for o in range(table.width) if o != place and table.header[o] in NAMES["item"]]
        if not named and table.header[place] in _NUMBERS:
            named = [o for o in range(table.width) if o != place]
        if not named or not columns[place] or not all(cell.isdecimal() for cell in columns[place]):
            continue
        numbers = np.array(columns[place], dtype=np.int64)
        order, first = np.argsort(numbers), int(numbers.min())
        if first in (0, 1) and np.array_equal(numbers[order], np.arange(first, first + rows)):
            names = [columns[named[0]][row] for row in order.tolist()]
            in_file_order = bool((np.diff(order) > 0).all())
            found.append(_Reading(table.header[place], table.header[named[0]], names, in_file_order, first))
    return found


def _open_array(source: Path, where: str) -> Features:
    try:
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{where}: expected a .npy of floats, got {source}: {error}") from error
    if not np.issubdtype(array.dtype, np.floating) or array.ndim not in (2, 3):
        raise ValueError(
            f"{where}: expected floats [I, D] or [I, L, D], got {array.dtype} {list(array.shape)} in {source}"
        )
    shape = (1, array.shape[1]) if array.ndim == 2 else (array.shape[1], array.shape[2])
    return Features(source, len(array), shape, str(array.dtype), None, lambda row: array[row].reshape(shape))


def _open_safetensors(source: Path, where: str) -> Features:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(source, framework="pt")
        keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: {source} is no sound safetensors file: {error}") from error
    if len(keys) == 1:
        return _of_tensor(file.get_tensor(keys[0]), source, where)
    return _by_name(source, where, keys, file.get_tensor)


def _open_torch(source: Path, where: str) -> Features:
    loaded = _load(source, where)
    if isinstance(loaded, Tensor):
        return _of_tensor(loaded, source, where)
    if isinstance(loaded, Mapping):
        return _by_name(
            source, where, list(map(str, loaded)), {str(k): v for k, v in loaded.items()}.__getitem__
        )
    if isinstance(loaded, (list, tuple)) and loaded and all(isinstance(part, Tensor) for part in loaded):
        return _of_tensor(torch.stack(list(loaded)), source, where)
    raise ValueError(
        f"{where}: expected a tensor or {{name: tensor}} in {source}, got {type(loaded).__name__}"
    )


def _open_folder(source: Path, where: str) -> Features:
    files = sorted(f for f in source.iterdir() if f.suffix in (*_TORCH, ".npy"))
    if not files:
        raise ValueError(f"{where}: expected .pt, .pth or .npy files in {source}, one an item, found none")

    by_name = {file.stem: file for file in files}

    def load(name: str) -> Any:
        file = by_name[name]
        if file.suffix != ".npy":
            return _load(file, where)
        return torch.from_numpy(np.load(file, allow_pickle=False))

    return _by_name(source, where, list(by_name), load)


def _of_tensor(tensor: Tensor, source: Path, where: str) -> Features:
    if not tensor.is_floating_point() or tensor.dim() not in (2, 3):
        raise ValueError(f"{where}: expected floats [I, D] or [I, L, D], got {describe(tensor)} in {source}")
    shape = (1, tensor.shape[1]) if tensor.dim() == 2 else (tensor.shape[1], tensor.shape[2])
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Features(
        source, len(tensor), shape, dtype, None, lambda row: tensor[row].float().reshape(shape).numpy()
    )


def _by_name(source: Path, where: str, names: list[str], get: Callable[[str], Any]) -> Features:
    """Features of a tensor an item; the first one's shape is that of all."""
    if not names:
        raise ValueError(f"{where}: expected a tensor an item in {source}, found none")
    first = _states(get(names[0]))
    if first is None:
        raise ValueError(
            f"{where}: expected floats [D] or [L, D] for item {names[0]!r} of {source}, got others"
        )
    shape = (first.shape[0], first.shape[1])

    def read(row: int) -> Array:
        try:
            found = _states(get(names[row]))
        except (OSError, ValueError) as error:
            raise BrokenInput(str(error)) from error
        if found is None or found.shape != shape:
            got = "others" if found is None else f"{list(found.shape)}"
            raise BrokenInput(f"expected floats {list(shape)} as the first item has, got {got}")
        return found

    return Features(source, len(names), shape, str(first.dtype), names, read)


def _states(value: Any) -> Array | None:
    """`[L, D]` of what was kept for one item: a tensor, or one a level; None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        if len({part.shape for part in value}) > 1:
            return None
        value = torch.stack(list(value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    # A batch of one item that was kept with it.
    squeezed = value.detach().float().squeeze()
    if squeezed.dim() == 1:
        return squeezed[None].numpy()
    return squeezed.numpy() if squeezed.dim() == 2 else None


def _load(file: Path, where: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # Whatever a damaged or foreign file makes of torch's reader.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: {file} cannot be read as tensors alone: {reason}") from error
