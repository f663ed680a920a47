"""Kills builds on first use at random moments: a builder, or all of a build, a compiler, one of several.

The library is a small one of a few sources without torch's headers. Whoever is left, and whoever comes next,
must have the library; and nothing but it, its stamp and the lock may then be there, nor a compiler's drafts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tally import Tally
from torch.utils import cpp_extension

from crossan_fast import _build

WHOLE = ["builder", "crossan_fast_probe.so", "stamp.json"]
SOURCE = '#include <map>\n#include <string>\nextern "C" size_t crossan_fast_probe_NUMBER() {\n\
  std::map<std::string, int> map{{"a", 1}};\n  return map.size();\n}\n'
PATIENCE = 120.0  # seconds for what a killed builder had started to end

# By kind: how many processes ask for the library at once, and which is killed.
KINDS = {"builder": 1, "all of a build": 1, "compiler": 1, "builder with waiters": 4, "one of eight": 8}


def attack(name: str, seed: int, points: int, root: Path) -> Tally:
    """`points` kills that met a build at work, each judged; every kind in turn."""
    tally = Tally(f"killed at random moments, {name}")
    assert cpp_extension.__name__  # imported once, before the forks
    logging.disable(logging.WARNING)
    rng = random.Random(f"{name}:{seed}")
    _sources(root)
    began = time.monotonic()
    assert _end_of(_asking(root / "whole")) == 0
    took = time.monotonic() - began
    kinds = list(KINDS)
    for number in range(points * 20):
        if tally.tried == points:
            break
        kind, place = kinds[tally.tried % len(kinds)], root / f"kill{number}"
        met, how = _killed(kind, place, rng, rng.random() * took)
        if met:
            how = how or _afterwards(place)
            said = " ".join(path.read_text()[-200:] for path in place.glob("said*"))
            tally.add(how, f"kill {number}, {kind}: {said}")
        shutil.rmtree(place, ignore_errors=True)
    return tally


def _sources(root: Path) -> None:
    folder = root / "csrc" / "probe"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"probe{number}.cpp").write_text(SOURCE.replace("NUMBER", str(number)))
    _build.CSRC = root / "csrc"
    flags: Callable[[], list[str]] = lambda: ["-O1"]  # noqa: E731
    _build.PARTS["probe"] = _build.Part("probe", ("probe",), flags, missing=_build._no_compiler)


def _asking(place: Path) -> int:
    """The process id of a fork, leader of a group, that asks for the library; its status says if it came."""
    drafts = place / "drafts"
    drafts.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    os.setsid()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.environ |= {"CROSSAN_FAST_BUILD_DIR": str(place / "built"), "TMPDIR": str(drafts), "MAX_JOBS": "2"}
    try:
        _build.load("probe")
    except _build.BuildError as error:
        (place / f"said{os.getpid()}").write_text(str(error))
        os._exit(3)
    except BaseException as error:
        (place / f"said{os.getpid()}").write_text(repr(error))
        os._exit(4)
    os._exit(0)


def _killed(kind: str, place: Path, rng: random.Random, moment: float) -> tuple[bool, str | None]:
    """Whether the kill met its process, and how the others were lost."""
    asking = [_asking(place) for _ in range(KINDS[kind])]
    time.sleep(moment)
    victim, met = rng.choice(asking) if kind == "one of eight" else asking[0], True
    if kind == "builder with waiters":
        victim = _builder(place) or victim
    if kind == "all of a build":
        for process in _processes(victim):
            _kill(process)
    elif kind == "compiler":
        below = [process for process in _processes(victim) if process != victim]
        met = bool(below)
        if below:
            _kill(rng.choice(below))
    else:
        _kill(victim)
    statuses = {process: _end_of(process) for process in asking}
    killed = statuses.pop(victim) if kind != "compiler" else -signal.SIGKILL
    others = [status for status in statuses.values() if status and kind != "compiler"]
    if kind == "compiler" and statuses[victim] == 4:
        return met, "unnamed"
    return met and killed == -signal.SIGKILL, "a waiter got nothing" if others else None


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _builder(place: Path) -> int | None:
    """Who says in the lock that it builds."""
    for lock in (place / "built").glob("*/builder"):
        words = lock.read_text().split()
        if len(words) > 1:
            return int(words[1])
    return None


def _processes(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(of) == session and state != "Z":
                found.append(int(entry.name))
    return found


def _afterwards(place: Path) -> str | None:
    """How the next process was lost, right after the kill, or None."""
    if _end_of(_asking(place)) != 0:
        return "could not be done again"
    left = sorted(path.name for folder in (place / "built").iterdir() for path in folder.iterdir())
    if left != WHOLE:
        return f"left {', '.join(name.split('-')[0] for name in left if name not in WHOLE)}"
    return "left a compiler's draft" if any((place / "drafts").iterdir()) else None


def _end_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
