"""Compile every Triton kernel for devices that are not here, and read its machine code.

    python -m benchmarks.aot [--arch 80 90] [--only side_network] [--short] [--missing] [--jobs 2] [--check]

The host functions themselves choose kernels, tile sizes and specialisations: they run on meta tensors of the
sizes of `benchmarks/aot_cases/<op>.py`, and each launch is compiled instead of started
(`kernels._common.record_launches`).
Registers, spills and shared memory come from `cuobjdump`, counts of instructions from `nvdisasm`, both of
Triton's own package. The table goes to benchmarks/results/aot.csv, so that a regression shows in a diff; rows
of several Tritons stand side by side, and `benchmarks/aot.sh` makes those of the oldest and of the newest.
`--check` fails on a limit that is broken instead of writing. A case that does not compile is named, and fails
the command in any case; its rows stay. `--missing` goes on where a run was cut off.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from benchmarks import aot_cases
from benchmarks.aot_cases import Case
from crossan_fast._files import write_whole
from crossan_fast.kernels._common import Launch, record_launches
from crossan_fast.training.precision import computing_in
from crossan_fast.training.train_config import ComputePrecision

RESULTS = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = (80, 89, 90)
# What an sm_86 has of an sm_80's 163 kB: both launch the same.
SHARED_LIMIT = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# What rows are made, and made anew, together.
_TABLE = ("triton", "arch", "case", "dtype")


@dataclass(frozen=True)
class Row:
    """One compiled kernel; spills are bytes of stack a thread, the rest counts of instructions."""

    arch: str
    triton: str
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


def compile_case(case: Case, arch: int, hot_only: bool = False) -> list[Row]:
    """One row for each different kernel the case launches."""
    precision: ComputePrecision = "tf32" if case.dtype == "tf32" else "fp32"
    with record_launches(arch, case.hot if hot_only else None) as launches, computing_in(precision):
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
        if row.kernel in case.matrix and not row.hmma + row.hgmma:
            problems.append(f"{where} has no matrix instruction")
        if arch == 90 and row.kernel in case.wide and not row.hgmma:
            problems.append(f"{where} has no HGMMA")
    return problems


def differences(rows: Iterable[Row], table: list[dict[str, str]]) -> list[str]:
    """Rows that the same Triton's table of the case does not have, in words; none where it has no such table.

    Compilation repeats exactly, so shared memory and matrix instructions must agree. Registers may differ by
    8, the unit in which they are given to a thread: below that nothing changes on the device.
    """
    where = (*_TABLE, "kernel", "warps")
    exact = ("shared_bytes", "hgmma", "hmma")
    problems = []
    tables = {tuple(r[key] for key in _TABLE) for r in table}
    for row in rows:
        mine = {key: str(value) for key, value in asdict(row).items()}
        if tuple(mine[key] for key in _TABLE) not in tables:
            continue
        same = [r for r in table if all(r[key] == mine[key] for key in where)]
        near = [r for r in same if abs(int(r["registers"]) - row.registers) <= 8]
        if not any(all(r[key] == mine[key] for key in exact) for r in near):
            found = [{key: r[key] for key in ("registers", *exact)} for r in same]
            problems.append(
                f"{' '.join(mine[key] for key in where)}: {row.registers} registers, "
                f"{row.shared_bytes} shared bytes, {row.hgmma} HGMMA, {row.hmma} HMMA; recorded: "
                f"{found or 'nothing'}. `python -m benchmarks.aot` records anew."
            )
    return problems


def recorded() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


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
        triton=triton.__version__,
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


AOT_CASES = aot_cases.of_all_ops()


# -------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    cases = [c for c in AOT_CASES if any(only in f"{c.name} {c.dtype}" for only in options.only)]
    cases = [c for c in cases if c.short or not options.short]
    if not cases:
        print(f"--only: no case among {[f'{c.name} {c.dtype}' for c in AOT_CASES]}", file=sys.stderr)
        return 2
    made = {tuple(r[key] for key in _TABLE) for r in recorded() if options.missing}
    tasks = [
        (AOT_CASES.index(case), arch, options.hot)
        for arch in options.arch
        for case in cases
        if (triton.__version__, f"sm_{arch}", case.name, case.dtype) not in made
    ]
    rows: list[Row] = []
    problems: list[str] = []
    # Fresh processes: a forked one would share this one's threads' locks.
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for (number, arch, _), (found, problem) in zip(
            tasks, pool.imap(_compile_numbered, tasks), strict=True
        ):
            rows += found
            problems += [problem] if problem else []
            for row in found:
                print(_line(row), flush=True)
            if not options.check and problem is None:
                _write(found, arch, AOT_CASES[number])  # at once: a run of hours may be cut off
    refused = bool(problems)
    problems += failures(rows, cases)
    if options.check:
        problems += differences(rows, recorded())
    print("\n".join(problems), file=sys.stderr)
    return 1 if refused or (options.check and problems) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cases' names and dtypes")
    parser.add_argument("--short", action="store_true", help="the few cases that every change compiles")
    parser.add_argument("--missing", action="store_true", help="what this Triton has no rows of")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--hot", action="store_true", help="hot kernels only; with --check")
    parser.add_argument(
        "--check", action="store_true", help="fail on a broken limit or another figure; write nothing"
    )
    options = parser.parse_args(arguments)
    if options.hot and not options.check:
        parser.error("--hot records less than a table row's case has: use it with --check")
    return options


def _line(row: Row) -> str:
    return (
        f"{row.arch}  {row.case:46s} {row.dtype}  {row.kernel:24s} {row.warps:2d} warps "
        f"{row.registers:4d} regs {row.spill_bytes:5d} spill {row.shared_bytes:7d} shared "
        f"{row.hgmma:4d} HGMMA {row.hmma:4d} HMMA {row.ldg128:4d}/{row.ldg} LDG.128"
    )


def _compile_numbered(task: tuple[int, int, bool]) -> tuple[list[Row], str | None]:
    """A case by its number, what a process can be sent; and why it does not compile, where it does not."""
    number, arch, hot_only = task
    case = AOT_CASES[number]
    try:
        return compile_case(case, arch, hot_only), None
    except Exception as error:  # of any kind: the other cases are compiled, and the command fails
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return [], f"sm_{arch} {case.name} {case.dtype} does not compile: {type(cause).__name__}: {cause}"


def _write(rows: list[Row], arch: int, case: Case) -> None:
    """Put in a case's rows for those there were of it by this Triton; the file appears whole."""
    known = {(c.name, c.dtype) for c in AOT_CASES}
    own = {"triton": triton.__version__, "arch": f"sm_{arch}", "case": case.name, "dtype": case.dtype}
    kept = [r for r in recorded() if (r["case"], r["dtype"]) in known and not own.items() <= r.items()]
    table = [*kept, *({k: str(v) for k, v in asdict(row).items()} for row in rows)]
    table.sort(key=lambda r: (r["arch"], r["triton"], r["case"], r["dtype"], r["kernel"], r["registers"]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_whole(RESULTS, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
