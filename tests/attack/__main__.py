"""The whole attack, by seeds: `python -m tests.attack`; writes benchmarks/results/reliability.csv.

Each part runs in processes of its own: one that is killed by a signal loses the case it was at, and the part
goes on behind it. `--calls`, `--files`, `--faults` and `--kills` say how much; one seed is one attack.
Rows of parts that were not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "helpers"))

from programs import QUIET, ROOT, faulty, run_python
from tally import Tally, write

RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
AT_ONCE = 10_000  # cases of one process: what it leaks, or breaks, ends with it


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if args.worker:
        return _work(args)
    tallies: list[Tally] = []

    def done(tally: Tally) -> None:
        tallies.append(tally)
        print(tally, flush=True)
        write(args.out, tallies)

    for part in args.parts or (() if args.soak else PARTS):
        for run in _parts(args)[part]:
            done(run())
    if args.soak:
        for tally in _soak(args.soak, args.soak // 100 if args.openings is None else args.openings):
            done(tally)
    return 1 if any(tally.lost for tally in tallies) else 0


def _parts(args: argparse.Namespace) -> dict[str, list[Callable[[], Tally]]]:
    """By part, its attacks."""
    backends = {"cpp": args.calls, "eager": args.calls // 10, "triton": args.triton_calls}
    faults, kinds = _faults()

    def asked(command: str) -> bool:
        return args.kills is None or command in args.kills

    return {
        "calls": [partial(_in_processes, "calls", b, args.seed, count) for b, count in backends.items()],
        "raw": [partial(_raw_calls, args.calls, args.seed)],
        "files": [partial(_in_processes, "files", form, args.seed, args.files) for form in _formats()],
        "threads": [partial(_in_processes, "threads", "", args.seed, 1)],
        "faults": [
            partial(faulty, command, kind)
            for command in (faults if args.faults is None else args.faults)
            for kind in (kinds if args.kinds is None else args.kinds)
        ],
        "kills": [partial(_killed, command) for command in _kills() if asked(command)]
        + [partial(_killed_at_random, c, args.seed, args.points) for c in _random_kills() if asked(c)],
    }


PARTS = ("calls", "raw", "files", "threads", "faults", "kills")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=100_000, help="hostile, and raw, calls of the C++ ops")
    parser.add_argument(
        "--triton-calls", type=int, default=500, help="in Triton's interpreter, which is slow"
    )
    parser.add_argument("--files", type=int, default=10_000, help="hostile files of each format")
    parser.add_argument("--faults", nargs="*", metavar="COMMAND", help="whose calls fail (default: all)")
    parser.add_argument("--kinds", nargs="*", help="how they fail: EIO, SIGKILL, … (default: every kind)")
    parser.add_argument("--kills", nargs="*", metavar="COMMAND", help="what is killed (default: all)")
    parser.add_argument("--points", type=int, default=50, help="random moments that each is killed at")
    parser.add_argument(
        "--soak",
        type=int,
        metavar="STEPS",
        help="so many steps in one process, and a hundredth of openings; alone where no part is named",
    )
    parser.add_argument("--openings", type=int, metavar="N", help="of --soak, in place of a hundredth")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    return parser


# -- a part in processes of its own ------------------------------------------------------------------------


def _in_processes(part: str, which: str, seed: int, count: int) -> Tally:
    tally, first = Tally(_NAMES[part].format(which)), 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while first < count:
            size = min(AT_ONCE, count - first)
            progress.write_text("")
            words = [part, which, str(seed), str(first), str(size)]
            done = run_python("-m", "tests.attack", "--worker", *words, progress=progress)
            if done.returncode == 0:
                tally.merge(Tally.from_json(done.stdout.splitlines()[-1]))
                first += size
                continue
            # The cases before the one that it died at are counted again by a process that stops before it.
            at = int(progress.read_text() or first)
            if at > first:
                words = [part, which, str(seed), str(first), str(at - first)]
                before = run_python("-m", "tests.attack", "--worker", *words, progress=progress)
                if before.returncode == 0:
                    tally.merge(Tally.from_json(before.stdout.splitlines()[-1]))
            tally.add("crashed", f"{which}:{seed}:{at}: status {done.returncode} {done.stderr[-200:]}")
            first = at + 1
    return tally


_NAMES = {
    "calls": "calls with a hostile argument, {}",
    "files": "damaged and forged files, {}",
    "threads": "ops from other threads and processes",
}


def _work(args: argparse.Namespace) -> int:
    part, which, seed, first, count = args.worker
    with open(os.environ["ATTACK_PROGRESS"], "w") as progress:

        def every(index: int) -> None:
            progress.seek(0)
            progress.write(str(index))
            progress.flush()

        print(_part(part, which, int(seed), int(first), int(count), every).to_json())
    return 0


def _part(part: str, which: str, seed: int, first: int, count: int, every: Callable[[int], None]) -> Tally:
    import torch

    torch.set_num_threads(1)
    if part == "calls":
        import hostile_calls

        return hostile_calls.attack(which, seed, first, count, every)
    if part == "files":
        import hostile_files

        with tempfile.TemporaryDirectory() as folder:
            return hostile_files.attack(which, Path(folder), seed, first, count, every)
    import threads

    return threads.attack(seed)


# -- programs ----------------------------------------------------------------------------------------------


def _raw_calls(count: int, seed: int) -> Tally:
    """The fuzz of the registered ops, without the public functions' checks in front of them."""
    tally, at_once = Tally("calls of the bare C++ ops"), 10_000
    for first in range(0, count, at_once):
        size = min(at_once, count - first)
        done = run_python("tests/ops/fuzz_cpp.py", str(size), f"{seed + first}", OMP_NUM_THREADS="2")
        tally.tried += size
        if done.returncode:
            tally.lost["crashed"] += 1
            tally.examples["crashed"] = f"seed {seed + first}: status {done.returncode} {done.stderr[-200:]}"
    return tally


def _soak(steps: int, openings: int) -> Iterator[Tally]:
    """Its tallies as they grow: the last of a name is the whole, or what was done when it was ended."""
    with tempfile.TemporaryDirectory() as folder:
        counts = (str(steps), str(openings))
        words = [sys.executable, str(ROOT / "tests" / "attack" / "soak.py"), *counts, folder]
        going = subprocess.Popen(words, cwd=ROOT, env=os.environ | QUIET, stdout=subprocess.PIPE, text=True)
        assert going.stdout is not None
        with going:
            yield from map(Tally.from_json, going.stdout)
    if going.returncode:
        crash = {"crashed": f"status {going.returncode}"}
        yield Tally("one process that goes on", 1, Counter(crashed=1), crash)


def _formats() -> list[str]:
    import hostile_files

    return list(hostile_files.FORMATS)


def _faults() -> tuple[list[str], list[str]]:
    """The commands whose calls fail, and how."""
    import faults

    return list(faults.COMMANDS), list(faults.KINDS)


def _kills() -> list[str]:
    import kill_points

    return sorted(kill_points.COMMANDS)


def _killed(command: str) -> Tally:
    tally = Tally(f"killed at each call that changes files, {command}")
    with tempfile.TemporaryDirectory() as folder:
        done = run_python("tests/helpers/kill_points.py", command, folder)
    if done.returncode:
        tally.add("lost", done.stderr[-400:])
    else:
        tally.tried = int(done.stdout)
    return tally


def _random_kills() -> list[str]:
    import kills

    return [*kills.COMMANDS, kills.LIBRARY]


def _killed_at_random(command: str, seed: int, points: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        done = run_python("tests/attack/kills.py", command, str(seed), str(points), folder)
    if done.returncode:
        return Tally(f"killed at random moments, {command}", 1, Counter(lost=1), {"lost": done.stderr[-400:]})
    return Tally.from_json(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
