"""What imported states are like: a few rows of them, each as a few sums, which tell them from others.

States that were computed elsewhere have no encoder to be told by. Of some rows of a cache a run keeps random
projections, whose distances are about those of the rows themselves: storage in another dtype moves a row a
little, states of another model are somewhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossan_fast.cache import HiddenStateCache

Sample = Mapping[str, Any]

_ROWS, _SUMS = 8, 16
# In lengths of a row: int8 rounds one of width 4096 by 0.15 at most, one of 768 by 0.06, and fp8 by 0.06;
# rows of another model are 1 or more away.
_FAR = 0.3


def sample_of(cache: HiddenStateCache, name: str) -> Sample | None:
    """Of modality `name`, JSON values; None where no item has it."""
    column, shape = _place(cache, name)
    there = cache.present[:, column].nonzero().flatten()
    if not len(there):
        return None
    count = min(_ROWS, len(there))
    rows = there[torch.arange(count) * (len(there) - 1) // max(1, count - 1)].tolist()
    # As text: a number a line, as lists are written, would fill the file.
    sums = [" ".join(f"{number:.4g}" for number in row) for row in _sums(cache, name, rows)]
    return {"shape": shape, "rows": rows, "sums": sums}


def refuse_other_rows(sample: Sample, cache: HiddenStateCache, name: str) -> None:
    """Raise ValueError where most rows of a sample are others in `cache`, whose rows mean the same items.

    Some may have been corrected since; rows of another shape others see to.
    """
    if name not in (m.name for m in cache.modalities):
        return
    column, shape = _place(cache, name)
    pairs = zip(sample["rows"], sample["sums"], strict=True)
    held = {row: text for row, text in pairs if row <= cache.num_items and cache.present[row, column]}
    if shape != sample["shape"] or not held:
        return
    rows, then = list(held), np.array([_numbers(text) for text in held.values()])
    moved = np.linalg.norm(_sums(cache, name, rows) - then, axis=1)
    others = [row for row, far in zip(rows, moved > _FAR * np.linalg.norm(then, axis=1), strict=True) if far]
    if 2 * len(others) > len(rows):
        first = cache.item_names[others[0]]
        raise ValueError(
            f"cache: modality {name!r}: expected the imported states that the run was trained on, got others "
            f"in {len(others)} of {len(rows)} rows that were compared, such as item {first!r} (row "
            f"{others[0]}); files of one width may have been swapped in importing"
        )


def check_sample(sample: Any) -> None:
    """Raise TypeError where a file holds something else in place of `sample_of`."""
    try:
        rows, shape = sample["rows"], sample["shape"]
        numbers = [_numbers(text) for text in sample["sums"]]
        whole = all(type(number) is int and number >= 1 for number in (*rows, *shape))
        sound = whole and len(shape) == 2 and len(numbers) == len(rows)
        sound = sound and all(len(row) == _SUMS and all(map(math.isfinite, row)) for row in numbers)
    except (TypeError, ValueError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise TypeError(f"sources: expected a sample of rows, got {sample!r:.100}")


def _place(cache: HiddenStateCache, name: str) -> tuple[int, list[int]]:
    """The modality's column of `present`, and its shape."""
    column = [m.name for m in cache.modalities].index(name)
    return column, [cache.modalities[column].levels, cache.modalities[column].width]


def _sums(cache: HiddenStateCache, name: str, rows: list[int]) -> npt.NDArray[np.float64]:
    """`[n, 16]`: all numbers of a row, each under a random sign that is the same everywhere and always."""
    states = cache.gather(torch.tensor(rows), "cpu", dtype=torch.float32)[name].flatten(1).double().numpy()
    words = np.asarray(np.random.PCG64(0).random_raw(states.shape[1]), dtype=np.uint64)[:, None]
    signs = 2.0 * (words >> np.arange(_SUMS, dtype=np.uint64) & np.uint64(1)).astype(np.float64) - 1
    return np.asarray(states @ signs)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(" ")]
