"""Opt-in search for launch configs: CROSSAN_FAST_AUTOTUNE=1, on a GPU.

Without it every launch takes its config from the fixed tables. With it, the first call of each (op, device,
shape bucket) times a few candidates and keeps the fastest on disk, under a key that holds the kernels' source
and the versions of torch and triton, so that nothing stale is ever read. Sizes are bucketed by the caller: a
varying batch starts no new search. A result's last bits depend on its config, so ranks that agree share one
file (CROSSAN_FAST_AUTOTUNE_FILE).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from crossan_fast._files import write_whole
from crossan_fast._untrusted import is_whole, read_json

Config = TypeVar("Config")

# No kernel has more candidates, and no machine as many shapes as fill the file.
MAX_CANDIDATES, MAX_BYTES = 64, 16 << 20
_FILE = "CROSSAN_FAST_AUTOTUNE_FILE"
_SOURCES = Path(__file__).parent
_found: dict[str, int] = {}


def enabled() -> bool:
    return os.environ.get("CROSSAN_FAST_AUTOTUNE", "0") == "1"


def tuned(
    op: str,
    key: Sequence[Hashable],
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    time: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """The fastest of `candidates`, the first of which is the default; the default where tuning is off.

    Args:
        op: whose configs these are.
        key: what a result depends on besides source and versions: device name, widths, dtype, bucket.
        candidates: configs; their number and order belong to the key.
        run: launches the kernels with a config; called many times, so it must only write its outputs. A
            config that the device has too little shared memory or registers for is passed over.
        time: milliseconds of a call; None: `triton.testing.do_bench`'s median.

    Raises:
        ValueError: the file of results is not what autotuning writes.
    """
    if not enabled() or len(candidates) < 2:
        return candidates[0]
    name = "/".join(str(part) for part in (op, *key, _versions(), _digest(repr(list(candidates)))))
    if name not in _found:
        _found.update(_read())
    if name not in _found:
        measure = time or functools.partial(triton.testing.do_bench, return_mode="median")
        times = [_milliseconds(measure, functools.partial(run, candidate)) for candidate in candidates]
        _found[name] = times.index(min(times))  # the default, which will say what it lacks, if none fits
        _write({**_read(), name: _found[name]})
    choice, count = _found[name], len(candidates)
    if choice >= count:
        raise ValueError(f"{_FILE}: {path()}: {choice} for {name}, expected less than {count}")
    return candidates[choice]


def _milliseconds(measure: Callable[[Callable[[], object]], float], call: Callable[[], object]) -> float:
    try:
        return measure(call)
    except OutOfResources:
        return math.inf


def bucket(count: int) -> int:
    """The least power of two ≥ count: what keys hold in place of a size that varies from batch to batch."""
    return 1 << (max(count, 1) - 1).bit_length()


def path() -> Path:
    """Where results are kept: CROSSAN_FAST_AUTOTUNE_FILE, or a file in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(_FILE) or cache / "crossan_fast" / "autotune.json")


@functools.cache
def _versions() -> str:
    """Kernels' source, torch and triton: a result of others is never looked at."""
    files = sorted(_SOURCES.rglob("*.py"))
    return _digest("".join(f.read_text() for f in files) + torch.__version__ + triton.__version__)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read() -> dict[str, int]:
    """The file's choices by key; ValueError where it holds anything else, names the file."""
    if not path().exists():
        return {}
    found = read_json(path(), _FILE, MAX_BYTES)
    if not isinstance(found, dict):
        raise ValueError(f"{_FILE}: {path()}: expected an object of choices, got {type(found).__name__}")
    for key, choice in found.items():
        if not is_whole(choice, 0, MAX_CANDIDATES - 1):
            raise ValueError(
                f"{_FILE}: {path()}: expected a candidate's number at {key[:200]!r}, got {repr(choice)[:200]}"
            )
    return found


def _write(results: dict[str, int]) -> None:
    write_whole(path(), json.dumps(results, indent=1, sort_keys=True))
