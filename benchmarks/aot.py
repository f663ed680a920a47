"""Compile every Triton kernel but deduplicate's for devices that are not here, and read its machine code.

    python -m benchmarks.aot [--arch 80 90] [--only side_network] [--jobs 2] [--check]

The host functions themselves choose kernels, tile sizes and specialisations: they run on meta tensors of the
sizes of `AOT_CASES`, and each launch is compiled instead of started (`kernels._common.record_launches`).
Registers, spills and shared memory come from `cuobjdump`, counts of instructions from `nvdisasm`, both of
Triton's own package. The table goes to benchmarks/results/aot.csv, so that a regression shows in a diff.
`--check` fails on a limit that is broken instead of writing.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import triton

from crossan_fast._files import write_whole
from crossan_fast.kernels import (
    full_loss,
    fusion,
    in_batch_loss,
    rank_of_target,
    side_network,
    topk_scores,
)
from crossan_fast.kernels._common import Launch, record_launches
from crossan_fast.ops.fusion import FusionWeights
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights

RESULTS = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Case:
    """Host functions called on meta tensors.

    Attributes:
        name: op and sizes.
        dtype: what it computes in.
        run: calls the host functions.
        hot: kernels that must not spill.
        matrix: kernels whose products must be matrix instructions.
        wide: those of them whose tiles have the 64 rows of sm_90's own instruction, and so must use it.
    """

    name: str
    dtype: str
    run: Callable[[], object]
    hot: frozenset[str] = frozenset()
    matrix: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()


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
    with record_launches(arch, case.hot if hot_only else None) as launches:
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
    """Rows that the recorded table does not have, in words; empty where another Triton wrote the table.

    Compilation repeats exactly, so shared memory and matrix instructions must agree. Registers may differ by
    8, the unit in which they are given to a thread: below that nothing changes on the device.
    """
    where = ("arch", "case", "dtype", "kernel", "warps")
    exact = ("shared_bytes", "hgmma", "hmma")
    problems = []
    for row in rows:
        mine = {key: str(value) for key, value in asdict(row).items()}
        same = [r for r in table if all(r[key] == mine[key] for key in where)]
        if any(r["triton"] != mine["triton"] for r in same):
            continue
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


# ------------------------------------------------------------------------------------------------- cases


def _new(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=kind)


def _side_network(
    items: int, width: int, dtype: torch.dtype, stored: torch.dtype | None = None, rank: int = 64
) -> None:
    """Forward and backward of CROSSAN's four towers of 7 levels, gathered by id from a resident cache."""
    towers, levels, rows = 4, 7, 20_315
    structure = SideNetworkStructure((width,) * towers, tuple((m,) for m in range(towers)))

    def new(*shape: int) -> torch.Tensor:
        return _new(*shape, kind=dtype)

    weights = SideNetworkWeights(
        [new(levels, rank, width)] * towers,
        [new(levels, rank)] * towers,
        [new(levels, width, rank)] * towers,
        [new(levels, width)] * towers,
        [new(levels)] * towers,
        [new(levels) for _ in structure.cross_pairs],
    )
    states = [_new(rows, levels, width, kind=stored or dtype) for _ in range(towers)]
    scales = [_new(rows, levels, kind=torch.float32) for _ in range(towers)] if stored else []
    ids = _new(items, kind=torch.int64)
    call = (states, scales, ids, None, weights.flatten(), *structure.static, dtype)
    outputs = side_network.forward(*call)
    side_network.backward(outputs[:towers], outputs[towers:], *call)


def _fusion(items: int, width: int, dtype: torch.dtype) -> None:
    """MOMEF of four towers into d = 64, every expert chosen, weights of the compute dtype."""
    modalities, d = 4, 64

    def new(*shape: int) -> torch.Tensor:
        return _new(*shape, kind=dtype)

    weights = FusionWeights(
        [new(d, width)] * modalities,
        [new(d)] * modalities,
        new(modalities, modalities * d),
        new(modalities),
        new(modalities, 4 * d, d),
        new(modalities, 4 * d),
        new(modalities, d, 4 * d),
        new(modalities, d),
    )
    hidden = [new(items, width)] * modalities
    call = (hidden, weights.flatten(), None, None, None, dtype)
    grad, _, probability, *saved = fusion.forward(*call)
    fusion.backward(grad, probability, saved, *call)


def _in_batch_loss(sequences: int, columns: int, dtype: torch.dtype) -> None:
    users, items = _new(sequences, 10, 64, kind=dtype), _new(columns, 64, kind=dtype)
    slots, counts = _new(sequences, 11, kind=torch.int64), _new(columns, kind=torch.int64)
    rest = (users, items, slots, counts, _new(columns, kind=torch.float32))
    loss, lse = in_batch_loss.forward(*rest)
    in_batch_loss.backward(loss, lse, *rest)


def _full_loss(rows: int, dtype: torch.dtype) -> None:
    rest = (_new(rows, 64, kind=dtype), _new(20_315, 64, kind=dtype), _new(rows, kind=torch.int64))
    loss, lse = full_loss.forward(*rest)
    full_loss.backward(loss, lse, *rest)


def _ranking(op: Callable[..., object], argument: int | torch.Tensor, dtype: torch.dtype) -> None:
    """12,076 users, 20,314 items, histories of 10."""
    users, items = _new(12_076, 64, kind=dtype), _new(20_315, 64, kind=dtype)
    op(users, items, argument, _new(12_076, 10, kind=torch.int64))


_WALKS = frozenset({"fused_kernel", "down_kernel", "walk_kernel", "up_kernel", "grad_down_kernel"})
_SIDE_NETWORK = _WALKS | {"grad_walk_kernel", "up_gradient_kernel", "down_gradient_kernel"}
_FUSION = frozenset({"forward_kernel", "items_kernel", "heads_kernel", "experts_kernel"})
_LOSS = frozenset({"forward_kernel", "backward_rows_kernel", "backward_columns_kernel"})
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _cases() -> Iterator[Case]:
    for items, width, dtype, stored in (
        (704, 768, "bf16", None),
        (20_314, 768, "bf16", None),
        (20_314, 768, "bf16", torch.float8_e4m3fn),
        (704, 768, "fp32", None),
        # The backward's chunk of items: larger counts compile the same for their first chunk.
        (8_192, 1024, "bf16", None),
        (704, 4096, "bf16", None),
        (8_192, 4096, "bf16", None),
    ):
        half = dtype == "bf16"
        yield Case(
            f"side_network n={items} D={width} r=64" + (" fp8" if stored else ""),
            dtype,
            partial(_side_network, items, width, _DTYPES[dtype], stored),
            hot=_SIDE_NETWORK,
            matrix=_SIDE_NETWORK | {"mixing_kernel", "combine_kernel"} if half else frozenset(),
            # *walk* and *grad_walk* alone take 16 items, for the number of programs; fused ones take 64.
            wide=_SIDE_NETWORK - {"walk_kernel", "grad_walk_kernel"} if half else frozenset(),
        )
    # Ranks up to 256 must fit as well; there the limits of shared memory are what is checked.
    run = partial(_side_network, 704, 768, torch.bfloat16, None, 256)
    yield Case("side_network n=704 D=768 r=256", "bf16", run)
    for dtype, kind in _DTYPES.items():
        # A product of fp32 takes matrix units only where torch's own switch allows tf32.
        fusion_products, loss_products = (_FUSION, _LOSS) if dtype == "bf16" else (frozenset(), frozenset())
        for items, width in ((704, 768), (20_314, 768), (20_314, 1024), (20_314, 4096)):
            run = partial(_fusion, items, width, kind)
            yield Case(f"fusion n={items} D={width} d=64", dtype, run, _FUSION, fusion_products)
        for sequences, columns in ((64, 704), (1_024, 11_264)):
            run = partial(_in_batch_loss, sequences, columns, kind)
            name = f"in_batch_loss rows={sequences * 10} columns={columns} d=64"
            yield Case(name, dtype, run, _LOSS, loss_products, loss_products)
        run = partial(_full_loss, 640, kind)
        yield Case("full_loss rows=640 columns=20315 d=64", dtype, run, _LOSS, loss_products, loss_products)
        for k in (10, 100, 200):
            run = partial(_ranking, topk_scores.forward, k, kind)
            matrix = frozenset({"topk_kernel"} if dtype == "bf16" else ())
            yield Case(f"topk_scores k={k} d=64", dtype, run, frozenset({"topk_kernel"}), matrix)
        targets = _new(12_076, kind=torch.int64)
        run = partial(_ranking, rank_of_target.forward, targets, kind)
        matrix = frozenset({"rank_kernel"} if dtype == "bf16" else ())
        yield Case("rank_of_target d=64", dtype, run, frozenset({"rank_kernel"}), matrix, matrix)


AOT_CASES: tuple[Case, ...] = tuple(_cases())


# -------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cases' names and dtypes")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--hot", action="store_true", help="hot kernels only; with --check")
    parser.add_argument(
        "--check", action="store_true", help="fail on a broken limit or another figure; write nothing"
    )
    options = parser.parse_args(arguments)
    if options.hot and not options.check:
        parser.error("--hot records less than a table row's case has: use it with --check")
    cases = [c for c in AOT_CASES if any(only in f"{c.name} {c.dtype}" for only in options.only)]
    if not cases:
        parser.error(f"--only: no case among {[f'{c.name} {c.dtype}' for c in AOT_CASES]}")
    tasks = [(AOT_CASES.index(case), arch, options.hot) for arch in options.arch for case in cases]
    rows = []
    # Fresh processes: a forked one would share this one's threads' locks.
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for found in pool.imap(_compile_numbered, tasks):
            rows += found
            for row in found:
                print(
                    f"{row.arch}  {row.case:46s} {row.dtype}  {row.kernel:24s} {row.warps:2d} warps "
                    f"{row.registers:4d} regs {row.spill_bytes:5d} spill {row.shared_bytes:7d} shared "
                    f"{row.hgmma:4d} HGMMA {row.hmma:4d} HMMA {row.ldg128:4d}/{row.ldg} LDG.128",
                    flush=True,
                )
    problems = failures(rows, cases)
    if options.check:
        problems += differences(rows, recorded())
    print("\n".join(problems), file=sys.stderr)
    if options.check:
        return 1 if problems else 0
    _write(rows, {(f"sm_{arch}", case.name, case.dtype) for arch in options.arch for case in cases})
    return 0


def _compile_numbered(task: tuple[int, int, bool]) -> list[Row]:
    """A case by its number: what a process can be sent."""
    number, arch, hot_only = task
    return compile_case(AOT_CASES[number], arch, hot_only)


def _write(rows: list[Row], done: set[tuple[str, str, str]]) -> None:
    """Replace the rows of what was compiled, keep those of other cases there are; the file appears whole."""
    known = {(case.name, case.dtype) for case in AOT_CASES}
    kept = [r for r in recorded() if (r["arch"], r["case"], r["dtype"]) not in done]
    kept = [r for r in kept if (r["case"], r["dtype"]) in known]
    table = [*kept, *({k: str(v) for k, v in asdict(row).items()} for row in rows)]
    table.sort(key=lambda r: (r["arch"], r["case"], r["dtype"], r["kernel"], r["registers"]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_whole(RESULTS, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
