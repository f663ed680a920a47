"""Kills a command by SIGKILL at random moments, and checks what it leaves; run as a program of its own.

    python kills.py COMMAND SEED POINTS FOLDER

`kill_points` ends a process before each of its calls; here the kernel ends one wherever it is: between two
calls, in a call, in a library's code. A child carries COMMAND out and is killed after a random part of the
time that the command takes. What it leaves must be the old state or the new one, or a run after any of its
epochs; the command must then succeed and leave nothing else behind. Prints a tally.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import faults
import kill_points
import killed_builds
import torch
from tally import Tally

State = Any
Command = tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], State]]


def _cache(name: str) -> Command:
    prepare, run, folder = kill_points.COMMANDS[name]
    return prepare, run, lambda where: kill_points.state_of(where / folder)


# By command: what makes the old state, what is carried out, what reads the state.
COMMANDS: dict[str, Command] = {
    "train": (kill_points.one_run, kill_points.train, lambda where: kill_points.run_of(where / "run")),
    "build": _cache("first"),
    "append": _cache("change"),
    "convert": (
        kill_points.old_build,
        kill_points.convert,
        lambda where: kill_points.state_of(where / "out"),
    ),
    "overwrite": _cache("overwrite"),
    "save": faults.COMMANDS["save"],
    "checkpoint": faults.COMMANDS["checkpoint"],
}
LIBRARY = "library"  # built on first use: `killed_builds`
AT_MOST = 20  # tries for each point: a command may end before its moment


def child(work: Callable[[], None]) -> int:
    """The process id of a fork that does `work`; it ends with status 1 after an error, which it prints."""
    found = os.fork()
    if found:
        return found
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def attack(name: str, seed: int, points: int, root: Path) -> Tally:
    """`points` kills that met a command at work, each judged."""
    prepare, run, state_of = COMMANDS[name]
    tally = Tally(f"killed at random moments, {name}")
    rng = random.Random(f"{name}:{seed}")
    old_place, new_place = root / "old", root / "new"
    for place in (old_place, new_place):
        place.mkdir(parents=True)
        prepare(place)
    old = state_of(old_place)
    began = time.monotonic()
    _end_of(child(partial(run, new_place)))
    took = time.monotonic() - began
    new, files = state_of(new_place), kill_points.listing(new_place)
    assert new is not None and new != old
    for number in range(points * AT_MOST):
        if tally.tried == points:
            break
        place = root / f"kill{number}"
        shutil.copytree(old_place, place)
        began = time.monotonic()
        at_work = child(partial(run, place))
        time.sleep(rng.random() * took)
        os.kill(at_work, signal.SIGKILL)
        if _end_of(at_work) == -signal.SIGKILL:
            tally.add(_lost(name, place, run, state_of, old, new, files), f"kill {number}")
        else:  # the machine had more time for this one
            took = min(took, time.monotonic() - began)
        shutil.rmtree(place)
    if tally.tried < points:
        print(f"{tally.what}: met at work {tally.tried} times of {points}", file=sys.stderr, flush=True)
    return tally


def _lost(
    name: str,
    place: Path,
    run: Callable[[Path], None],
    state_of: Callable[[Path], State],
    old: State,
    new: State,
    files: list[str],
) -> str | None:
    left = state_of(place)
    if left not in (old, new) and name != "train":
        return "neither old nor new"
    try:
        run(place)
    except (OSError, ValueError) as error:
        print(repr(error), file=sys.stderr, flush=True)
        return "could not be done again"
    if state_of(place) != new:
        return "done again, it was another"
    if kill_points.listing(place) != files:
        return "something was left"
    return None


def _end_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, seed, points, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if command == LIBRARY:
        print(killed_builds.attack(command, seed, points, folder).to_json())
    else:
        print(attack(command, seed, points, folder).to_json())
