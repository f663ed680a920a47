"""Writing caches: whole or not at all, damage found, full disks survived."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from cache_states import make_states

from crossan_fast.cache import (
    CacheError,
    CorruptCacheError,
    HiddenStateCache,
    folders,
    verify_cache,
    write_cache,
)
from crossan_fast.cache import format as cache_format
from crossan_fast.cache.writer import CacheWriter
from crossan_fast.config import Modality


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_verify_finds_any_flipped_byte(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_format, "SEGMENT_BYTES", 64)
    folder = tmp_path / "c"
    write_cache(folder, make_states(), dtype=dtype)
    assert verify_cache(folder) == []
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.glob("*")):
        if path.name == "meta.json":
            continue
        sound = path.read_bytes()
        for place in torch.randint(len(sound), (6,), generator=generator).tolist():
            damaged = bytearray(sound)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            (problem,) = verify_cache(folder)
            assert problem.startswith(f"{path.name}: bytes {place // 64 * 64} to ")
            with pytest.raises(CorruptCacheError, match=path.name):
                HiddenStateCache.open(folder, verify=True)
        path.write_bytes(sound)
    assert verify_cache(folder) == []


def test_a_flipped_byte_of_the_description_is_found_when_opening(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cache(folder, make_states(), item_names=[f"ítem {k}" for k in range(9)])
    sound = (folder / "meta.json").read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        (folder / "meta.json").write_bytes(damaged)
        with pytest.raises(CacheError, match=r"meta\.json"):
            HiddenStateCache.open(folder)


def test_verify_names_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_format, "SEGMENT_BYTES", 96)  # two rows of text: 2 · 6 · 4 bytes each
    write_cache(tmp_path / "c", make_states())
    path = tmp_path / "c" / "text.states.bin"
    damaged = bytearray(path.read_bytes())
    damaged[48 * 5] ^= 4
    path.write_bytes(damaged)
    assert verify_cache(tmp_path / "c") == [
        "text.states.bin: bytes 192 to 287 (rows 4 to 5) differ from what was written"
    ]


def test_a_short_file_is_found_when_opening(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", make_states())
    path = tmp_path / "c" / "audio.states.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCacheError, match=r"audio.states.bin: expected 240 bytes, got 239 bytes"):
        HiddenStateCache.open(tmp_path / "c")


def test_absent_rows_are_zeros_and_may_hold_anything_before(tmp_path: Path) -> None:
    states = make_states()
    states["text"][3] = float("nan")
    present = torch.ones(10, 2, dtype=torch.bool)
    present[0] = present[3, 0] = False
    write_cache(tmp_path / "c", states, present=present)
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.arange(10))
    assert not rows["text"][3].any()
    assert torch.equal(rows["audio"], states["audio"])


def test_values_that_overflow_the_storage_dtype_are_named(tmp_path: Path) -> None:
    states = make_states()
    states["text"][5, 1, 1] = 7e4
    with pytest.raises(
        ValueError, match=r"states\['text'\]: .*NaN or inf \(once stored as fp16\) .* row 5 \(item '5'\)"
    ):
        write_cache(tmp_path / "c", states, dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    write_cache(tmp_path / "c", states, dtype="bf16")


def test_existing_folders_are_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cache(folder, make_states())
    before = snapshot(folder)
    with pytest.raises(FileExistsError, match=r"folder: .* is not empty; pass overwrite=True"):
        write_cache(folder, make_states())
    assert snapshot(folder) == before
    write_cache(folder, make_states(4), overwrite=True)
    assert HiddenStateCache.open(folder, verify=True).num_items == 4
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "cat.png").touch()
    with pytest.raises(FileExistsError, match="is not a cache; it will not be replaced"):
        write_cache(other, make_states(), overwrite=True)
    with pytest.raises(ValueError, match=r"dtype: expected one of fp32, .* got 'bf61'; did you mean 'bf16'"):
        write_cache(tmp_path / "d", make_states(), dtype="bf61")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "photographs"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_cache_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = tmp_path / "c"
    write_cache(folder, make_states())
    before = snapshot(folder)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        patch.setattr(folders, "_swapped", lambda *_: False)
        with pytest.raises(OSError, match=r"No space|no room in .* what was there is unchanged"):
            write_cache(folder, make_states(12), overwrite=True)
    assert snapshot(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_appended_rows_count_only_after_the_commit(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cache(folder, {"text": make_states()["text"]})
    old = HiddenStateCache.open(folder)
    text = Modality("text", 6, 2)
    new = torch.randn(3, 2, 6)
    base = cache_format.read_meta(folder)
    with CacheWriter(folder, [text], torch.float32, 12, base) as writer:
        assert writer.first_new_row == 10
        writer.write(text, [12, 10, 11], new, None)
        assert HiddenStateCache.open(folder, verify=True).num_items == 9
        with pytest.raises(IndexError, match="rows: expected rows of this write, got 9 to 9"):
            writer.write(text, [9], new[:1], None)
        writer.commit(["x", "y", "z"], torch.ones(3, 1, dtype=torch.bool), {})
    cache = HiddenStateCache.open(folder, verify=True)
    assert cache.item_names[9:] == ["9", "x", "y", "z"]
    assert torch.equal(cache.gather(torch.tensor([12, 10, 11]))["text"], new)
    assert torch.equal(cache.states("cpu")[0][:10], old.states("cpu")[0])


def test_a_full_disk_while_appending_leaves_the_old_cache_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    write_cache(folder, {"text": make_states()["text"]})
    before = snapshot(folder)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room in"):
        CacheWriter(folder, [Modality("text", 6, 2)], torch.float32, 12, cache_format.read_meta(folder))
    assert snapshot(folder) == before
