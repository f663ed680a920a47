"""Folders that take the place of others, and what killed processes leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cache_states import make_states

from crossan_fast.cache import HiddenStateCache, convert_cache, folders, write_cache
from crossan_fast.cache.folders import locked, whole_folder


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
        folders.remove_leftovers(tmp_path / "c", [])
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
