"""Compile every Triton kernel for devices that are not here, and read what the machine code uses.

    python -m benchmarks.aot [--arch 80 90] [--only side_network] [--check]

The host functions themselves choose kernels, tile sizes and specialisations: they run on meta tensors of the
sizes of `AOT_CASES`, and each launch is compiled instead of started (`kernels._common.record_launches`).
Registers, spills and shared memory come from `cuobjdump`, counts of instructions from `nvdisasm`, both of
Triton's own package. The table goes to benchmarks/results/aot.csv, so that a regression shows in a diff.
`--check` fails on a limit that is broken instead of writing.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton

from crossan_fast.kernels import side_network
from crossan_fast.kernels._common import Launch, record_launches
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights

RESULTS = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
MATRIX = {80: "HMMA", 90: "HGMMA"}


@dataclass(frozen=True)
class Case:
    """Host functions called on meta tensors.

    Attributes:
        name: op and sizes.
        dtype: what it computes in.
        run: calls the host functions.
        hot: kernels that must not spill.
        matrix: kernels whose products must be matrix instructions of their architecture.
    """

    name: str
    dtype: str
    run: Callable[[], object]
    hot: frozenset[str] = frozenset()
    matrix: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """One compiled kernel; spills are bytes of stack a thread, the rest counts of instructions."""

    arch: str
    case: str
    dtype: str
    kernel: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    hgmma: int
    hmma: int
    ffma: int
    ldg128: int
    ldg: int
    local: int


def compile_case(case: Case, arch: int) -> list[Row]:
    """One row for each different kernel the case launches."""
    with record_launches(arch) as launches:
        case.run()
    seen: dict[int, Row] = {}
    for launch in launches:
        if id(launch.compiled) not in seen:
            seen[id(launch.compiled)] = _measure(launch, case, arch)
    return list(seen.values())


def failures(rows: Iterable[Row], cases: Iterable[Case]) -> list[str]:
    """Every limit that is broken, in words."""
    by_name = {(case.name, case.dtype): case for case in cases}
    problems = []
    for row in rows:
        case, arch = by_name[row.case, row.dtype], int(row.arch.removeprefix("sm_"))
        where = f"{row.arch} {row.case} {row.dtype}: {row.kernel}"
        if row.kernel in case.hot and (row.spill_bytes or row.local):
            problems.append(f"{where} spills {row.spill_bytes} bytes, {row.local} local accesses")
        if row.shared_bytes > SHARED_LIMIT[arch]:
            problems.append(f"{where} needs {row.shared_bytes} bytes of shared memory")
        counts = {"HMMA": row.hmma, "HGMMA": row.hgmma}
        if row.kernel in case.matrix and not counts[MATRIX[arch]]:
            problems.append(f"{where} has no {MATRIX[arch]}")
    return problems


def _measure(launch: Launch, case: Case, arch: int) -> Row:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(launch.compiled.asm["cubin"])
        usage = _output(binaries / "cuobjdump", "--dump-resource-usage", cubin)
        code = _output(binaries / "nvdisasm", "-c", cubin)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    if set(used) != {"REG", "STACK"}:
        raise RuntimeError(f"cuobjdump: expected REG and STACK for {launch.name}, got {usage!r}")

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", code))

    return Row(
        arch=f"sm_{arch}",
        case=case.name,
        dtype=case.dtype,
        kernel=launch.name,
        warps=launch.compiled.metadata.num_warps,
        registers=used["REG"],
        spill_bytes=used["STACK"],
        shared_bytes=launch.compiled.metadata.shared,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        ffma=count("FFMA"),
        ldg128=count(r"(?:LDG|LDGSTS)\.E\.\S*128"),
        ldg=count("(?:LDG|LDGSTS)"),
        local=count("STL") + count("LDL"),
    )


def _output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------- cases


def _side_network(
    items: int, width: int, dtype: torch.dtype, *, rank: int = 64, stored: torch.dtype | None = None
) -> None:
    """Forward and backward of CROSSAN's four towers of 7 levels, gathered by id from a resident cache."""
    towers, levels, rows = 4, 7, 20_315
    structure = SideNetworkStructure((width,) * towers, tuple((m,) for m in range(towers)))

    def new(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=kind)

    weights = SideNetworkWeights(
        [new(levels, rank, width)] * towers,
        [new(levels, rank)] * towers,
        [new(levels, width, rank)] * towers,
        [new(levels, width)] * towers,
        [new(levels)] * towers,
        [new(levels) for _ in structure.cross_pairs],
    )
    states = [new(rows, levels, width, kind=stored or dtype) for _ in range(towers)]
    scales = [new(rows, levels, kind=torch.float32) for _ in range(towers)] if stored else None
    ids = new(items, kind=torch.int64)
    outputs, saved = side_network.forward(states, scales, ids, None, weights, structure, dtype)
    side_network.backward(outputs, saved, states, scales, ids, None, weights, structure, dtype)


_WALKS = frozenset({"fused_kernel", "down_kernel", "walk_kernel", "up_kernel", "grad_down_kernel"})
_SIDE_NETWORK = _WALKS | {"grad_walk_kernel", "up_gradient_kernel", "down_gradient_kernel"}

AOT_CASES: tuple[Case, ...] = tuple(
    Case(
        f"side_network n={items} D={width} r=64" + (" fp8" if stored else ""),
        "bf16",
        lambda items=items, width=width, stored=stored: _side_network(  # type: ignore[misc]
            items, width, torch.bfloat16, stored=stored
        ),
        hot=_SIDE_NETWORK,
        matrix=_SIDE_NETWORK | {"mixing_kernel"},
    )
    for items, width, stored in (
        (704, 768, None),
        (20_314, 768, None),
        (20_314, 768, torch.float8_e4m3fn),
        (20_314, 1024, None),
        (20_314, 4096, None),
    )
)


# -------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--check", action="store_true", help="fail on a broken limit; write nothing")
    options = parser.parse_args(arguments)
    cases = [case for case in AOT_CASES if options.only in case.name]
    rows = []
    for arch in options.arch:
        for case in cases:
            for row in compile_case(case, arch):
                rows.append(row)
                print(
                    f"{row.arch}  {row.case:38s} {row.dtype}  {row.kernel:24s} {row.warps:2d} warps "
                    f"{row.registers:4d} regs {row.spill_bytes:5d} spill {row.shared_bytes:7d} shared "
                    f"{row.hgmma:4d} HGMMA {row.hmma:4d} HMMA {row.ldg128:4d}/{row.ldg} LDG.128",
                    flush=True,
                )
    problems = failures(rows, cases)
    print("\n".join(problems), file=sys.stderr)
    if options.check:
        return 1 if problems else 0
    _write(rows, {(f"sm_{arch}", case.name, case.dtype) for arch in options.arch for case in cases})
    return 0


def _write(rows: list[Row], done: set[tuple[str, str, str]]) -> None:
    """Replace the rows of what was compiled, keep the others; the file appears whole."""
    kept = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if (r["arch"], r["case"], r["dtype"]) not in done]
    table = [*kept, *({k: str(v) for k, v in asdict(row).items()} for row in rows)]
    table.sort(key=lambda r: (r["arch"], r["case"], r["dtype"], r["kernel"], r["registers"]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, RESULTS)


if __name__ == "__main__":
    sys.exit(main())
