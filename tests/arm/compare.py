"""What the driver wrote on two machines: `python compare.py LINES NUMBERS LINES NUMBERS`, the emulated first.

A line a call: of its results, the largest difference of doubles between the machines, the largest of floats,
and the largest error of the first machine's floats, each by the result's scale and as a share of what
it may be.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path


@dataclass
class Result:
    call: str
    name: str
    scale: float
    error: float
    may: float
    may_double: float
    doubles: array[float]
    floats: array[float]


def read(lines: str, numbers: str) -> Iterator[Result]:
    values, at = array("d", Path(numbers).read_bytes()), 0
    for line in Path(lines).read_text(encoding="utf-8").splitlines():
        call, name, count, _, scale, *rest = line.split("|")
        first, at = at, at + 2 * int(count)
        middle = first + int(count)
        halves = values[first:middle], values[middle:at]
        error, may, may_double = map(float, rest)
        yield Result(call, name, float.fromhex(scale), error, may, may_double, *halves)
    if at != len(values):
        raise SystemExit(f"{numbers}: expected {at} numbers, got {len(values)}")


def difference(one: array[float], two: array[float]) -> float:
    if len(one) != len(two):
        return math.inf
    if one.tobytes() == two.tobytes():
        return 0.0
    pairs = [(x, y) for x, y in zip(one, two, strict=True) if x != y and not (x != x and y != y)]
    return max((abs(x - y) if math.isfinite(x - y) else math.inf for x, y in pairs), default=0.0)


def share(off: float, may: float) -> float:
    return off / may if may else (math.inf if off else 0.0)


def print_call(call: str, pairs: list[tuple[Result, Result]]) -> int:
    """The line of a call; how many of its results are too far off."""
    columns: list[list[tuple[float, float]]] = [[], [], []]
    failed = 0
    for one, two in pairs:
        scale = one.scale or 1.0
        offs = [
            (difference(one.doubles, two.doubles) / scale, one.may_double),
            (difference(one.floats, two.floats) / scale, one.may),
            (one.error, one.may),
        ]
        for column, (off, may) in zip(columns, offs, strict=True):
            column.append((share(off, may), off))
            if not off <= may:
                failed += 1
                print(f"too far: {call}: {one.name}: {off:.3g} of {may:.3g}")
    worst = [max(column) for column in columns]
    print(f"{len(pairs):7}" + "".join(f" {off:8.1e} {part:5.0%}" for part, off in worst) + f"  {call}")
    return failed


def main() -> None:
    first, second = (list(read(*sys.argv[i : i + 2])) for i in (1, 3))
    if [(r.call, r.name) for r in first] != [(r.call, r.name) for r in second]:
        raise SystemExit("the two machines made different calls")
    print(f"{'results':>7} {'doubles':>14} {'floats':>14} {'error':>14}  call")
    calls = groupby(zip(first, second, strict=True), key=lambda pair: pair[0].call)
    failed = sum(print_call(call, list(pairs)) for call, pairs in calls)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
