"""Makes every call that changes files fail in turn, and checks what is left; run with the shim preloaded.

    LD_PRELOAD=shim.so python faults.py COMMAND KIND FOLDER

For each n a child carries COMMAND out while its n-th call below its folder fails, or kills it. What it leaves
must be the old state or the new one; an error must say what is wrong; a child that says nothing must have
done its work; and the command must then succeed and leave nothing else behind. Prints a tally. A program of
its own: the shim is armed in children that are forked, one thread each.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import kill_points
import torch
from hostile_files import _read_checkpoint, _read_model, small_model
from tally import Tally

from crossan_fast.cache import CacheError
from crossan_fast.training import OptimizerConfig, make_optimizer
from crossan_fast.training.checkpoint import save_checkpoint

KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINTR": errno.EINTR, "SHORT": -1, "SIGKILL": -2}
FAILED, UNNAMED = 10, 11


def _save(scale: float) -> Callable[[Path], None]:
    def run(where: Path) -> None:
        model = small_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= scale
        model.save_pretrained(where / "m")

    return run


def _checkpoint(steps: int) -> Callable[[Path], None]:
    def run(where: Path) -> None:
        model = small_model()
        optimizer = make_optimizer(model, OptimizerConfig())
        for _ in range(steps):
            model.encode_items({"a": torch.ones(4, 2, 3)}).sum().backward()
            optimizer.step()
        torch.manual_seed(0)
        save_checkpoint(where / "last.safetensors", model, optimizer, {"steps": steps})

    return run


def _digest(read: Callable[[Path], Any]) -> Callable[[Path], str | None]:
    """What a reader gives, as text; None where there is nothing whole."""

    def state(where: Path) -> str | None:
        try:
            return hashlib.sha256(repr(read(where)).encode()).hexdigest()
        except (FileNotFoundError, CacheError):
            return None

    return state


def _cache(name: str) -> tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], str | None]]:
    prepare, run, folder = kill_points.COMMANDS[name]
    return prepare, run, _digest(lambda where: kill_points.state_of(where / folder))


# By command: what makes the old state, what is carried out, what reads the state.
COMMANDS = {
    "build": _cache("first"),
    "change": _cache("change"),
    "convert": _cache("overwrite"),
    "save": (_save(1.0), _save(2.0), _digest(_read_model)),
    "checkpoint": (_checkpoint(1), _checkpoint(3), _digest(_read_checkpoint)),
}


def main(command: str, kind: str, root: Path, most: int = 1000) -> Tally:
    shim = ctypes.CDLL(None)
    prepare, run, state_of = COMMANDS[command]
    for part in ("old", "new"):
        (root / part).mkdir(parents=True)
        prepare(root / part)
    old = state_of(root / "old")
    run(root / "new")
    new, files = state_of(root / "new"), kill_points.listing(root / "new")
    assert new is not None and new != old
    tally = Tally(f"a failing call ({kind}) in {command}")
    for number in range(most):
        place = root / f"{kind}{number}"
        shutil.copytree(root / "old", place)
        reached, status = _child(shim, run, place, KINDS[kind], number)
        if not reached:
            break
        if kind == "SIGKILL" and status == -signal.SIGKILL:
            status = FAILED
        tally.add(_lost(status, place, run, state_of, old, new, files), f"call {number}: {_said(place)}")
        shutil.rmtree(place)
        (root / f"{place.name}.said").unlink(missing_ok=True)
    return tally


def _child(shim: Any, run: Callable[[Path], None], place: Path, kind: int, number: int) -> tuple[bool, int]:
    """Whether there was such a call, and how the child ended."""
    child = os.fork()
    if child == 0:
        code, said = 0, ""
        shim.faults_arm(str(place).encode(), kind, ctypes.c_long(number))
        try:
            run(place)
        except (OSError, CacheError, ValueError) as error:
            code, said = FAILED, f"{type(error).__name__}: {error}"
            # A bare "[Errno 28]" says neither which file nor what to do.
            if isinstance(error, OSError) and error.filename is None and str(place) not in str(error):
                code = UNNAMED
        except BaseException as error:
            code, said = UNNAMED, "".join(traceback.format_exception(error)[-2:])
        reached = shim.faults_seen() > number
        shim.faults_arm(b"", 0, ctypes.c_long(-1))
        place.with_name(f"{place.name}.said").write_text(json.dumps([reached, said]))
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = place.with_name(f"{place.name}.said")
    return (json.loads(said.read_text())[0] if said.exists() else True), status


def _said(place: Path) -> str:
    said = place.with_name(f"{place.name}.said")
    return json.loads(said.read_text())[1] if said.exists() else "nothing"


def _lost(
    status: int,
    place: Path,
    run: Callable[[Path], None],
    state_of: Callable[[Path], str | None],
    old: str | None,
    new: str,
    files: list[str],
) -> str | None:
    if status not in (0, FAILED, UNNAMED):
        return "crashed"
    if (left := state_of(place)) not in (old, new):
        return "neither old nor new"
    if status == 0 and left != new:
        return "said nothing and did nothing"
    try:
        run(place)
    except (OSError, ValueError):
        return "could not be done again"
    if state_of(place) != new:
        return "done again, it was another"
    if kill_points.listing(place) != files:
        return "something was left"
    return "unnamed" if status == UNNAMED else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:])).to_json())
