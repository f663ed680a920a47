"""Which backend runs each pass of an op on a GPU, where backends keep the same for the backward.

The table `gpu_passes.json` holds what was measured, by the GPU's name; `python -m benchmarks choose` writes
it from recorded rows. A GPU that it does not hold goes by `ESTIMATES`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from crossan_fast._files import write_whole

TABLE = Path(__file__).with_name("gpu_passes.json")

# Ops whose backends keep the same tensors between the passes, so that each pass may have its own.
SHARED = {"side_network": ("triton", "cuda")}


@dataclass(frozen=True)
class Passes:
    """Attributes:
    forward, backward: out of the op's `SHARED` backends.
    reason: what says so, with its figures.
    """

    forward: str
    backward: str
    reason: str


ESTIMATES = {
    "side_network": Passes(
        "triton",
        "cuda",
        "by estimate on an H100 in bf16 a backward takes 0.085 ms by cuda and 0.18 by triton at 704 items, "
        "1.3 and 4.1 at 20,314; not yet measured on this GPU",
    )
}


def preferred(op: str) -> Passes | None:
    """What the current GPU's measurement says of `op`, or the estimate; None: the op has no such choice."""
    if op not in SHARED:
        return None
    if torch.cuda.is_available():
        measured = table().get(torch.cuda.get_device_name(), {})
        if op in measured:
            return measured[op]
    return ESTIMATES[op]


@functools.cache
def table() -> dict[str, dict[str, Passes]]:
    """What was measured, by GPU and op.

    Raises:
        ValueError: a file that `record` did not write, named.
    """
    if not TABLE.exists():
        return {}
    try:
        found = {
            gpu: {op: Passes(**entry) for op, entry in ops.items()}
            for gpu, ops in json.loads(TABLE.read_text(encoding="utf-8")).items()
        }
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{TABLE}: expected what `python -m benchmarks choose` writes, {error}") from error
    for ops in found.values():
        for op, passes in ops.items():
            if not {passes.forward, passes.backward} <= set(SHARED.get(op, ())):
                raise ValueError(
                    f"{TABLE}: {op}: expected backends out of {SHARED.get(op, ())}, got {passes}"
                )
    return found


def record(gpu: str, op: str, passes: Passes) -> None:
    """Put an entry into the table; the file changes whole or not at all."""
    known = {name: dict(ops) for name, ops in table().items()}
    known.setdefault(gpu, {})[op] = passes
    plain = {name: {op: vars(entry) for op, entry in ops.items()} for name, ops in known.items()}
    write_whole(TABLE, json.dumps(plain, indent=1, sort_keys=True) + "\n")
    table.cache_clear()


def joined(forward: str, backward: str) -> str:
    """One name for a backend each pass, as registered ops take it; the name itself where they are one."""
    return forward if forward == backward else f"{forward}/{backward}"


def of(backend: str, part: str) -> str:
    """The backend of `part` (`forward` or `backward`) out of what `joined` made."""
    forward, _, backward = backend.partition("/")
    return backward or forward if part == "backward" else forward
