"""Triton kernels compiled here for a GPU that is elsewhere: a cache folder to carry there.

    python -m benchmarks.triton_cache fill FOLDER [--arch 90] [--only side_network] [--jobs 2]
    python -m benchmarks.triton_cache use FOLDER      # on the GPU's machine, then TRITON_CACHE_DIR=FOLDER

`fill` builds the cases that gpu_suite.sh times and calls their Triton implementation without a GPU: an op
that is called hands meta tensors like its arguments to the host functions, whose launches are compiled
instead of started (`kernels._common.record_launches`), and gives zeros. So kernels, tiles and specialisations
are those of the case itself.

Triton finds a kernel again by a key of its own files and its compiled part, the kernel's source, the types of
its arguments, the options, the target, and ptxas' version. The compiled part is another for every version of
Python: fill with the Triton and the Python that the GPU's machine has, whatever the torch (CONTRIBUTING.md).
Where a folder lies is part of no key, but its lists of files name it, which `use` corrects; it also says
whether the key is this Triton's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks import registry
from benchmarks.registry import DTYPES, Setting
from crossan_fast._files import write_whole
from crossan_fast._sources import ReadAhead
from crossan_fast.kernels._common import record_launches
from crossan_fast.ops import _registration
from crossan_fast.training.feed import bucket

MADE = "made_by.json"
# What gpu_suite.sh times with Triton, in the order of its calls.
PATTERNS = (
    "side_network_missing/",
    "step/B=64,",
    "side_network/N=704,M=4,D=768,L",
    "item_encoder/N=704,M=4,D=768,L",
    "side_network/N=20314",
    "item_encoder/N=20314",
    "in_batch_loss/rows=10240,",
    "full_loss/rows=",
    "step/B=1024,",
    "epoch/data=synthetic",
    "batch_rows/users=64,",
)


@dataclass
class Compilations:
    """How many kernels were compiled, and how many found in Triton's cache."""

    compiled: int = 0
    found: int = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled += 1

    def __str__(self) -> str:
        return f"Triton compiled {self.compiled} kernels and found {self.found} in its cache"


def count() -> Compilations:
    """Count from now on."""
    counted = Compilations()
    triton.knobs.compilation.listener = counted
    return counted


# ------------------------------------------------------------------------------------------------ filling


def compile_case(
    case: registry.Case, dtype: str, arch: int, only: frozenset[str] | None = None
) -> set[tuple[str, str]]:
    """Compile for sm_`arch` what the case's Triton implementation launches in a call of each pass.

    Args:
        only: names of the kernels to compile; None: all.

    Returns:
        The host functions that were called, as (op, `forward` or `backward`).
    """
    called: set[tuple[str, str]] = set()
    with _recorded(arch, only, called):
        workload = case.build(Setting(torch.device("cpu"), DTYPES[dtype]))
        runnable = workload.implementations["triton"]()
        outputs = runnable.forward(0)
        if runnable.backward is not None:
            runnable.backward(0, outputs)
    return called


@contextlib.contextmanager
def _recorded(arch: int, only: frozenset[str] | None, called: set[tuple[str, str]]) -> Iterator[None]:
    """Within the block ops on CPU tensors take Triton's host functions, which compile and compute nothing."""
    host_function = _registration.host_function

    def recording(op: str, part: str, backend: str) -> Callable[..., Any]:
        function = host_function(op, part, backend)
        if backend != "triton":
            return function

        def on_meta(*arguments: Any) -> Any:
            called.add((op, part))
            results = function(*tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
            return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), results)

        return on_meta

    def slots(ahead: ReadAhead, item_ids: Tensor) -> int:  # as training counts them for a GPU
        return ahead.capacity or bucket(item_ids.unique().numel() + 1, item_ids.numel() + 1)

    with (
        record_launches(arch, only),
        mock.patch.object(_registration, "host_function", recording),
        mock.patch.object(ReadAhead, "slots", slots),
    ):
        yield


def _cases(only: Sequence[str]) -> list[registry.Case]:
    found = {case.name: case for pattern in PATTERNS for case in registry.select(pattern, device="cuda")}
    return [case for name, case in found.items() if any(part in name for part in only)]


def _fill_one(task: tuple[str, str, int]) -> tuple[str, Compilations, str | None]:
    """A case by its name, what a process can be sent; what was compiled, and why it failed, where it did."""
    name, dtype, arch = task
    label, counted = f"sm_{arch} {name} {dtype}", count()
    triton.knobs.compilation.store_binary_only = True  # a tenth of the bytes
    try:
        compile_case(next(case for case in _cases([""]) if case.name == name), dtype, arch)
    except Exception as error:  # of any kind: the other cases are compiled, and the command fails
        return label, counted, f"{type(error).__name__}: {error}"
    return label, counted, None


def fill(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    cases = _cases(options.only)
    tasks = [
        (c.name, d, arch) for arch in options.arch for c in cases for d in options.dtypes if d in c.dtypes
    ]
    failed = 0
    total = Compilations()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for label, counted, problem in pool.imap(_fill_one, tasks):
            total.compiled += counted.compiled
            total.found += counted.found
            failed += problem is not None
            print(f"{label}: {problem or counted}", flush=True)
    write_whole(folder / MADE, json.dumps(_identity(), indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total}; {size / 1e6:.1f} MB")
    return 1 if failed or not tasks else 0


# ------------------------------------------------------------------------------------------------ using


def use(options: argparse.Namespace) -> int:
    """Let the folder's lists of files name where they lie now; says whether this Triton will look there."""
    folder = options.folder.resolve()
    try:
        made = json.loads((folder / MADE).read_text())
    except FileNotFoundError:
        print(f"{folder}: expected {MADE}, which `fill` writes; got none")
        return 2
    for listing in folder.glob("*/__grp__*.json"):
        held = json.loads(listing.read_text())
        moved = {name: str(listing.parent / name) for name in held["child_paths"]}
        write_whole(listing, json.dumps({"child_paths": moved}))
    own = _identity()
    other = [f"{key} (here {own[key]}, there {made.get(key)})" for key in own if own[key] != made.get(key)]
    if other:
        print(f"{folder}: no kernel of it will be found: another {', '.join(other)}")
        return 1
    print(f"{folder}: kernels of this very Triton")
    return 0


def _identity() -> dict[str, str]:
    """What has to agree for a kernel to be found, besides its source, arguments and target."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "python": str(sysconfig.get_config_var("SOABI")),
        "ptxas": hashlib.sha256(str(get_ptxas_version(90)).encode()).hexdigest()[:16],
        "files": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_cache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    filling = commands.add_parser("fill", help="compile what gpu_suite.sh times")
    filling.add_argument("folder", type=Path)
    filling.add_argument("--arch", type=int, nargs="+", default=[90], help="80, 90, … (default 90)")
    filling.add_argument("--only", nargs="+", default=[""], help="parts of cases' names")
    filling.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES, help="default bf16")
    filling.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    filling.set_defaults(run=fill)
    using = commands.add_parser("use", help="make a carried folder one that Triton reads")
    using.add_argument("folder", type=Path)
    using.set_defaults(run=use)
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
