"""All methods of a size in turn, each row on disk as soon as it is made; what is there is not made again."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.recipes.records import append
from benchmarks.recipes.tabulate import read
from benchmarks.study import measure, table
from benchmarks.study.methods import METHODS, Method
from benchmarks.study.worlds import SIZES, Size, make_world, open_world
from crossan_fast.training.train_config import ComputePrecision

PHASES = ("time", "accuracy")
# Seconds that a method of a kind takes in each phase at `minilm` on 2 cores: a first guess of how long all
# will take, which what has been measured replaces.
_GUESS = {
    "time": {"trained": 45.0, "uncached": 25.0, "cached": 15.0, "ids": 15.0},
    "accuracy": {"trained": 320.0, "uncached": 600.0, "cached": 150.0, "ids": 60.0},
}
_SHARE = {"tiny": 0.03, "minilm": 1.0, "paper": 0.6}


@dataclass(frozen=True)
class Unit:
    """One row to make."""

    phase: str
    method: Method
    seed: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.phase, self.method.name, str(self.seed)

    @property
    def guess(self) -> float:
        return _GUESS[self.phase][self.method.kind]


def add_parser(commands: Any) -> None:
    """`python -m benchmarks study`."""
    parser = commands.add_parser("study", help="the papers' table: every method in one trainer")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--only", choices=PHASES, help="one phase alone")
    parser.add_argument("--methods", help=f"some of {','.join(METHODS)} (default all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of accuracy (default 0)")
    parser.add_argument("--steps", type=int, help="timed, of a method with encoders in the loop")
    parser.add_argument(
        "--learned-steps", type=int, help="after which methods that train encoders stop; 0: leave them"
    )
    parser.add_argument("--epochs", type=int, help="after which the others stop")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of accuracy in place of the size's own; rows say it"
    )
    parser.add_argument("--again", action="store_true", help="make rows that are there, too; trainings go on")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--data", type=Path, help="folder of scientific4k/ (default $CROSSAN_FAST_DATA)")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="text|image=FOLDER", help="of size paper"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="caches (default runs/study)")
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the results")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    size = SIZES[options.size]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = {name: Path(path) for name, _, path in (c.partition("=") for c in options.checkpoint)}
    folder = options.work.resolve() / size.name
    try:
        units = list(plan(size, options))
        make_world(size, folder, options.data, checkpoints)
    except (FileNotFoundError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    path = options.output / f"study-{size.name}.csv"
    if not options.again:
        there = recorded(path, results.device_name(torch.device(device)))
        units = [unit for unit in units if unit.key not in there]
    failed = _make_all(units, size, folder, device, path, limits_of(size, options), options.precision)
    if path.is_file():
        for written in table.write(path):
            print(written)
    return 1 if failed else 0


def plan(size: Size, options: argparse.Namespace) -> Iterator[Unit]:
    """The rows to make, times first.

    Raises:
        ValueError: an unknown method, or a phase that the size does not have.
    """
    names = options.methods.split(",") if options.methods else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods: unknown {unknown}, expected some of {list(METHODS)}")
    phases = (options.only,) if options.only else size.phases
    if missing := [phase for phase in phases if phase not in size.phases]:
        raise ValueError(f"--only: size {size.name} has phases {list(size.phases)}, got {missing[0]!r}")
    learned_steps = limits_of(size, options).learned_steps
    for phase in phases:
        for seed in options.seeds if phase == "accuracy" else options.seeds[:1]:
            for name in names:
                method = METHODS[name]
                if phase == "accuracy" and (method.accuracy_of or not _learns(method, learned_steps)):
                    continue
                yield Unit(phase, method, seed)


def _learns(method: Method, learned_steps: int) -> bool:
    return method.kind != "trained" or learned_steps > 0


def limits_of(size: Size, options: argparse.Namespace) -> measure.Limits:
    def chosen(given: int | None, own: int) -> int:
        return own if given is None else given

    return measure.Limits(
        chosen(options.steps, size.steps),
        chosen(options.learned_steps, size.learned_steps),
        chosen(options.epochs, size.epochs),
    )


def recorded(path: Path, device: str) -> set[tuple[str, str, str]]:
    """Phase, method and seed of the rows that there are; times count where they are this device's."""
    if not path.is_file():
        return set()
    rows = [row for row in read(path) if row["phase"] != "time" or row["device"] == device]
    return {(row["phase"], row["method"], row["seed"]) for row in rows}


def _make_all(
    units: list[Unit],
    size: Size,
    folder: Path,
    device: str,
    path: Path,
    limits: measure.Limits,
    precision: ComputePrecision | None,
) -> bool:
    """Whether some row could not be made."""
    left = sum(unit.guess for unit in units) * _SHARE[size.name]
    print(f"{len(units)} rows to make, about {left / 60:.1f} minutes", flush=True)
    begun, done, failed = time.perf_counter(), 0.0, False
    for unit in units:
        order = {
            "size": size.name,
            "folder": str(folder),
            "device": device,
            "phase": unit.phase,
            "method": unit.method.name,
            "seed": unit.seed,
            "limits": asdict(limits),
            "precision": precision if unit.phase == "accuracy" and precision else size.precision,
        }
        row = in_process(order) if size.own_process else make(order)
        done += unit.guess
        spent = time.perf_counter() - begun
        left = spent * (sum(u.guess for u in units) - done) / done
        if row is None:
            failed = True
            print(f"FAILED {' '.join(unit.key)}", file=sys.stderr, flush=True)
            continue
        append_row(path, row)
        print(f"{' '.join(unit.key)}: {spent:.0f} s so far, about {left / 60:.1f} minutes left", flush=True)
    return failed


COLUMNS = (
    *("date", "commit", "device", "threads", "torch", "precision", "phase", "method", "seed"),
    *("steps", "step_p20_s", "step_s", "steps_an_epoch", "epoch_s", "whole_epoch_s", "trainable"),
    *("held_bytes", "states_bytes", "step_bytes", "memory_bytes"),
    *("learned_steps", "learned_epochs", "best_epoch", "learned_s", "users", "candidates", "filter_history"),
    *("validation_ndcg@10", "test_hr@10", "test_ndcg@10"),
)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row, columns of the other phase left empty; its file has it when this returns."""
    append(path, [{name: row.get(name, "") for name in COLUMNS}])


def make(order: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process."""
    method = METHODS[order["method"]]
    size = replace(SIZES[order["size"]], precision=order["precision"])
    world = open_world(size, Path(order["folder"]), torch.device(order["device"]))
    measured = measure.time_row if order["phase"] == "time" else measure.accuracy_row
    found = measured(method, world, order["seed"], measure.Limits(**order["limits"]))
    return {**measure.common(method, world, order["seed"], order["phase"]), **found}


def in_process(order: dict[str, Any]) -> dict[str, Any] | None:
    """One row, in a process of its own, so that no method's memory serves another's; None where it failed."""
    command = [sys.executable, "-m", "benchmarks.study.run", json.dumps(order)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=results.ROOT)
    if ended.returncode:
        return None
    row: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    print(json.dumps(make(json.loads(sys.argv[1]))))
