"""Folders that take the place of others, and what killed processes leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_states import make_states

from crossan_fast._files import locked
from crossan_fast.cache import HiddenStateCache, build_cache, convert_cache, folders, write_cache
from crossan_fast.cache.folders import whole_folder
from crossan_fast.cli import main
from crossan_fast.data.items import ItemTable


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("swaps", [True, False])
def test_an_error_while_replacing_keeps_the_old_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    write_cache(tmp_path / "c", make_states())
    rename = os.rename

    def fails(one: Path, other: Path) -> bool:
        if swaps or Path(one).name == ".c.new":
            raise OSError(5, "Input/output error")
        rename(one, other)
        return True

    monkeypatch.setattr(folders, "_swapped", fails if swaps else lambda *_: False)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_cache(tmp_path / "c", make_states(4), overwrite=True)
    assert names_in(tmp_path) == ["c"]
    assert HiddenStateCache.open(tmp_path / "c", verify=True).num_items == 9


def test_a_cache_moved_aside_by_a_killed_process_is_found_by_readers(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", make_states())
    write_cache(tmp_path / ".c.new", make_states(4))
    os.rename(tmp_path / "c", tmp_path / ".c.old")
    assert HiddenStateCache.open(tmp_path / "c", verify=True).num_items == 9
    write_cache(tmp_path / "c", make_states(3), overwrite=True)
    assert names_in(tmp_path) == ["c"]
    assert HiddenStateCache.open(tmp_path / "c", verify=True).num_items == 3


def test_nobody_replaces_what_another_process_writes(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", make_states())
    with locked(tmp_path / "c"), pytest.raises(BlockingIOError, match=r"another process is writing to .*/c$"):
        write_cache(tmp_path / "c", make_states(4), overwrite=True)
    with whole_folder(tmp_path / "d", False) as fresh:
        (fresh / "kept").touch()
        with pytest.raises(BlockingIOError, match=r"another process is writing to .*/d$"):
            write_cache(tmp_path / "d", make_states())
        folders.remove_leftovers(tmp_path / "c", None)
        assert names_in(fresh) == ["kept"]
    assert names_in(tmp_path / "d") == ["kept"]


def test_a_link_to_a_cache_stays_one(tmp_path: Path) -> None:
    write_cache(tmp_path / "real", make_states())
    (tmp_path / "c").symlink_to(tmp_path / "real")
    write_cache(tmp_path / "c", make_states(4), overwrite=True)
    assert (tmp_path / "c").is_symlink() and names_in(tmp_path) == ["c", "real"]
    assert HiddenStateCache.open(tmp_path / "real").num_items == 4


def test_who_has_a_cache_open_keeps_its_rows_and_names(tmp_path: Path) -> None:
    states = make_states()
    write_cache(tmp_path / "c", states, item_names=[f"old{k}" for k in range(9)])
    held = HiddenStateCache.open(tmp_path / "c")
    write_cache(tmp_path / "c", make_states(), item_names=[f"new{k}" for k in range(9)], overwrite=True)
    assert held.item_names[1] == "old0"
    assert torch.equal(held.gather(torch.arange(10))["text"], states["text"])


def test_opening_while_a_cache_is_replaced_gives_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "c", make_states(), item_names=[f"old{k}" for k in range(9)])
    new = make_states(20)
    write_cache(tmp_path / "d", new)
    read_meta, waiting = folders.read_meta, [None]

    def slow(folder: Path) -> object:
        meta = read_meta(folder)
        if waiting:
            waiting.pop()
            convert_cache(tmp_path / "d", tmp_path / "c", "fp32", overwrite=True)
        return meta

    monkeypatch.setattr(folders, "read_meta", slow)
    cache = HiddenStateCache.open(tmp_path / "c")
    assert cache.num_items == 20 and cache.item_names[1] == "1"
    assert torch.equal(cache.gather(torch.arange(21))["text"], new["text"])


def build(where: Path, count: int) -> None:
    """A cache of `count` items; more of them are an append."""
    np.save(where / "a.npy", np.ones((count, 2, 500), np.float32))
    items = ItemTable([f"i{k}" for k in range(count)], {}, where)
    build_cache(items, [f"a={where / 'a.npy'}:precomputed"], where / "c", dtype="fp32", progress=False)


def kill_append(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before anything of it is journalled, and its journal lost: its room stays taken."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("crossan_fast.cache.build.runner.Runner.run", stop)
        build(where, 50)
    (where / "c" / "building.json").unlink()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_room_that_a_killed_append_took_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, 9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    commands = (
        lambda: build(tmp_path, 9),
        lambda: main(["cache", "info", str(tmp_path / "c")]),
        lambda: main(["cache", "verify", str(tmp_path / "c"), "--no-progress"]),
    )
    for command in commands:
        kill_append(tmp_path, monkeypatch)
        states = tmp_path / "c" / "a.states.bin"
        assert states.stat().st_size > len(before["a.states.bin"])
        with locked(tmp_path / "c"):  # by this process, for another open file of it
            main(["cache", "info", str(tmp_path / "c")])
            assert states.stat().st_size > len(before["a.states.bin"])
        command()
        assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


HOLD = """
import sys, time
from pathlib import Path
from crossan_fast._files import passing_folder
from crossan_fast.cache.folders import whole_folder
with whole_folder(sys.argv[1], True) as fresh, passing_folder(Path(sys.argv[1])) as beside:
    (fresh / "half").touch(), (beside / "half").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_convert_left_goes_with_the_next_command_and_not_while_it_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(tmp_path / "c", make_states())
    info = ["cache", "info", str(tmp_path / "c")]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert main(info) == 0
        assert len(names_in(tmp_path)) == 3, "its writer lives"
    finally:
        holder.kill()
        holder.wait()
    assert len(names_in(tmp_path)) == 3
    assert main(info) == 0
    assert names_in(tmp_path) == ["c"]


def test_a_stopped_build_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("crossan_fast.cache.build.finish.Outcome.write_report", stop)
        build(tmp_path, 50)
    before = names_in(tmp_path / "c")
    assert main(["cache", "info", str(tmp_path / "c")]) == 0
    assert names_in(tmp_path / "c") == before and "building.json" in before
    build(tmp_path, 50)
    assert HiddenStateCache.open(tmp_path / "c", verify=True).num_items == 50
