"""Kills a command at every call that changes files, and checks what it leaves; run as a program of its own.

    python kill_points.py COMMAND FOLDER

For each n a child process carries COMMAND out and ends, with no cleaning up, just before its n-th such call.
What it leaves must be the old cache or the new one, or a run after any of its epochs, and the command must
then succeed and leave nothing else behind. Prints how many places it was killed at. A program of its own,
since a child that is forked beside other threads may hang.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossan_fast._digests import load_tensors
from crossan_fast.cache import CacheError, HiddenStateCache, build_cache, convert_cache, folders
from crossan_fast.data.items import ItemTable
from crossan_fast.training import TrainConfig, Trainer
from crossan_fast.training.verify import verify_run

CALLS = ("pwrite", "replace", "rename", "unlink", "ftruncate", "posix_fallocate", "fsync", "mkdir", "rmdir")
KILLED = 9

State = tuple[list[str], list[bytes], bytes] | None


def states(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 3)).astype(np.float32)


def inputs(where: Path, first: np.ndarray, second: np.ndarray) -> None:
    """What a cache is built of; writing it is no part of what is killed."""
    np.save(where / "a.npy", first)
    np.save(where / "b.npy", second)


def build(where: Path, dtype: str = "int8") -> None:
    count = len(np.load(where / "a.npy", mmap_mode="r"))
    items = ItemTable([f"i{k}" for k in range(count)], {}, where)
    specs = [f"{name}={where / name}.npy:precomputed" for name in "ab"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        build_cache(
            items,
            specs,
            where / "c",
            dtype=dtype,
            batch_size=2,
            progress=False,
            journal_every=0,
            device="cpu",
        )


def old_inputs(where: Path) -> None:
    inputs(where, states(0, 4), states(1, 4))


def old_build(where: Path) -> None:
    old_inputs(where)
    build(where)


def new_inputs(where: Path) -> None:
    """One modality of two items changed, one of them gone bad; one item more."""
    first = states(0, 5)
    first[1] += 1
    first[2] = np.nan
    inputs(where, first, states(1, 5))


def old_build_of_new_inputs(where: Path) -> None:
    old_build(where)
    new_inputs(where)


def build_fp32(where: Path) -> None:
    build(where, "fp32")


def convert(where: Path) -> None:
    convert_cache(where / "c", where / "out", "fp32", overwrite=True)


def convert_without_swapping(where: Path) -> None:
    folders._swapped = lambda one, other: False
    convert(where)


def basis(where: Path) -> None:
    convert_cache(where / "c", where / "out", "fp32", basis={"a": 2}, centre=True, overwrite=True)


def old_basis(where: Path) -> None:
    two_caches(where)
    basis(where)
    shutil.rmtree(where / "c")
    os.rename(where / "out", where / "c")


def old_basis_of_new_inputs(where: Path) -> None:
    old_basis(where)
    new_inputs(where)


def two_caches(where: Path) -> None:
    old_build(where)
    convert_cache(where / "c", where / "out", "fp16")


def one_run(where: Path) -> None:
    """A cache, and users to train on it."""
    inputs(where, states(0, 12), states(1, 12))
    build(where)
    (where / "users.tsv").write_text(
        "".join(f"u{k}\ti{k} i{k + 4} i{k + 8} i{(k + 1) % 4}\n" for k in range(4))
    )


def train(where: Path) -> None:
    config = {
        "cache": str(where / "c"),
        "users": str(where / "users.tsv"),
        "run": str(where / "run"),
        "model": {"embedding_dim": 4, "bottleneck": 2, "window": 3, "blocks": 1, "dropout": 0.5},
        "evaluation": {"candidates": "all", "k": [10]},
        "min_items": 4,
        "batch_size": 4,
        "epochs": 2,
        "backend": "eager",
    }
    Trainer(TrainConfig.from_dict(config)).fit(resume=True, progress=False, say=lambda line: None)


def run_of(folder: Path) -> State:
    """What a trained run holds, None before its first epoch."""
    if not (folder / "last.safetensors").exists():
        return None
    report = verify_run(folder)
    assert not report.problems and not report.unchecked, report
    tensors, metadata = load_tensors(folder / "last.safetensors", "run")
    epochs = [str(entry["epoch"]) for entry in json.loads(metadata["progress"])["history"]]
    return epochs, [tensors[name].numpy().tobytes() for name in sorted(tensors)], b""


COMMANDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    "first": (old_inputs, build, "c"),
    "change": (old_build_of_new_inputs, build, "c"),
    "change-in-a-basis": (old_basis_of_new_inputs, build_fp32, "c"),
    "basis": (two_caches, basis, "out"),
    "overwrite": (two_caches, convert, "out"),
    "overwrite-without-swapping": (two_caches, convert_without_swapping, "out"),
    "train": (one_run, train, "run"),
}


def state_of(folder: Path) -> State:
    """All that a reader sees, None where there is no cache yet."""
    try:
        cache = HiddenStateCache.open(folder, verify=True)
    except (CacheError, FileNotFoundError) as error:
        if not isinstance(error, FileNotFoundError) and "is damaged" in str(error):
            raise
        return None
    rows = cache.gather(torch.arange(cache.num_items + 1))
    return (
        list(cache.item_names),
        [r.numpy().tobytes() for r in rows.values()],
        cache.present.numpy().tobytes(),
    )


def kill_at(number: int) -> None:
    """End this process before its call `number` of those that change files."""
    seen = 0

    def counted(
        call: Callable[..., Any], counts: Callable[..., bool] = lambda *a: True
    ) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            if counts(*arguments):
                if seen == number:
                    os._exit(KILLED)
                seen += 1
            return call(*arguments, **named)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    os.open = counted(os.open, lambda path, flags, *_: bool(flags & os.O_CREAT))
    builtins.open = counted(open, lambda path, mode="r", *_: "w" in mode)
    io.open = counted(io.open, lambda path, mode="r", *_: "w" in mode)
    folders._swapped = counted(folders._swapped)


def main(command: str, root: Path) -> None:
    prepare, run, name = COMMANDS[command]
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; power cuts are not tried here
    for part in ("old", "new"):
        (root / part).mkdir()
        prepare(root / part)
    look = run_of if command == "train" else state_of
    old = look(root / "old" / name)
    run(root / "new")
    new, files = look(root / "new" / name), listing(root / "new")
    assert new is not None and new != old
    for number in range(1000):
        place = root / f"kill{number}"
        shutil.copytree(root / "old", place)
        child = os.fork()
        if child == 0:
            try:
                kill_at(number)
                run(place)
            except BaseException as error:
                print(f"{number}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED), (number, status)
        left = look(place / name)
        assert left in (old, new) or command == "train", (number, listing(place))
        if status == 0:
            assert left == new
            print(number)
            return
        run(place)
        assert look(place / name) == new, number
        assert listing(place) == files, (number, listing(place), files)
        shutil.rmtree(place)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
