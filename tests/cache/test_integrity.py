"""Damage is found before its use, on every road that bytes of a cache take; nothing else is read for it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_states import make_states
from torch import Tensor

from crossan_fast._digests import digest_of
from crossan_fast.cache import (
    CacheError,
    CorruptCacheError,
    HiddenStateCache,
    build_cache,
    contents,
    convert_cache,
    verify_cache,
    write_cache,
)
from crossan_fast.cache import format as cache_format
from crossan_fast.cache.build import finish
from crossan_fast.cache.format import Segment, read_meta, segment_ranges
from crossan_fast.data.items import ItemTable

ROWS = torch.arange(10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of nine items in int8, in segments of 32 bytes: a few rows, or a part of one."""
    monkeypatch.setattr(cache_format, "SEGMENT_BYTES", 32)
    write_cache(tmp_path / "c", make_states(), item_names=[f"item-{k}" for k in range(1, 10)], dtype="int8")
    return tmp_path / "c"


def flip(path: Path, place: int) -> bytes:
    """Flip one bit; gives what was there."""
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[place] ^= 1 << (place % 8)
    path.write_bytes(damaged)
    return sound


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A changed meta.json with a digest that fits."""
    body = json.loads((folder / "meta.json").read_text())
    del body["sha256"]
    change(body)
    (folder / "meta.json").write_text(json.dumps({**body, "sha256": digest_of(body)}))


def use_all(cache: HiddenStateCache) -> tuple[list[Tensor], list[str]]:
    return [*cache.gather(ROWS).values()], list(cache.item_names)


ROADS: dict[str, Callable[[HiddenStateCache], object]] = {
    "gather": use_all,
    "prefetch": lambda cache: list(cache.prefetch_stored([ROWS])),
    "states": lambda cache: (cache.states("cpu", ROWS), cache.scales("cpu", ROWS)),
    "whole": lambda cache: cache.states("cpu"),
    "resident": lambda cache: cache.to("cpu", "resident"),
    "warm": lambda cache: cache.warm(wait=True),
    "copy": copy.deepcopy,
    "convert": lambda cache: convert_cache(cache.folder, cache.folder.with_name("out"), "fp32"),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["text.states.bin", "audio.scales.bin", "present.bin", "items.txt"])
def test_a_flipped_bit_is_found_before_its_use(folder: Path, road: str, name: str) -> None:
    path = folder / name
    for place in np.random.default_rng(0).integers(path.stat().st_size, size=6).tolist():
        sound = flip(path, place)
        with pytest.raises(CorruptCacheError, match=rf"{name}: its bytes differ from what was written"):
            ROADS[road](HiddenStateCache.open(folder))
        path.write_bytes(sound)
    ROADS[road](HiddenStateCache.open(folder))


def test_a_row_is_refused_again_and_others_are_served(folder: Path) -> None:
    flip(folder / "text.states.bin", 12 * 9 + 3)  # of the last row, in a segment with the one before
    cache = HiddenStateCache.open(folder)
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match=r"108 bytes|96 to 119 \(rows 8 to 9\)"):
            cache.gather(torch.tensor([3, 9]))
    assert torch.equal(cache.gather(torch.tensor([3]))["text"], cache.gather(torch.tensor([3]))["text"])


def test_a_segment_is_read_once_and_only_where_rows_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read, whole = HiddenStateCache.open(folder), [], contents.hash_range

    def counted(descriptor: int, start: int, stop: int, path: Path) -> str:
        read.append((path.name, start))
        return whole(descriptor, start, stop, path)

    monkeypatch.setattr(contents, "hash_range", counted)
    cache.gather(torch.tensor([5, 5]))  # bytes 60 to 71 of text, 30 to 35 of audio
    audio, text = "audio.states.bin", "text.states.bin"
    assert sorted(read) == [(audio, 0), (audio, 32), (text, 32), (text, 64)]
    cache.gather(torch.tensor([5, 4, 3]))  # 36 to 59 of text
    assert len(read) == 4
    cache.states("cpu")
    assert len(read) == len(set(read)) == 4 + 2


def test_when_to_compare_is_asked_for(folder: Path) -> None:
    sound = flip(folder / "text.states.bin", 40)
    for verify in ("open", True):
        with pytest.raises(CorruptCacheError, match=r"is damaged: text\.states\.bin"):
            HiddenStateCache.open(folder, verify=verify)
    for verify in ("off", False):
        use_all(HiddenStateCache.open(folder, verify=verify))
    (folder / "text.states.bin").write_bytes(sound)
    flip(folder / "items.txt", 2)
    assert HiddenStateCache.open(folder, verify="off").item_names[1] != "item-1"
    with pytest.raises(ValueError, match=r"verify: expected open, lazy, off, .* got 'lasy'; did you"):
        HiddenStateCache.open(folder, verify="lasy")  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", ["lazy", "off"])
def test_present_is_true_or_false(folder: Path, verify: Any) -> None:
    data = bytearray((folder / "present.bin").read_bytes())
    data[2 * 4 + 1] = 2
    (folder / "present.bin").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    forge(folder, lambda body: body["files"].update({"present.bin": [[len(data), digest]]}))
    with pytest.raises(CorruptCacheError, match=r"present\.bin: expected 0 or 1 .* got \[1, 2\] for row 4"):
        HiddenStateCache.open(folder, verify=verify)


# -- files that are cut while they are mapped ---------------------------------------------------------------


@pytest.mark.parametrize("verify", ["lazy", "off"])
def test_a_file_cut_under_an_open_cache_is_named(tmp_path: Path, verify: Any) -> None:
    states = {"text": torch.randn(2000, 3, 8)}
    states["text"][0] = 0
    uses: list[Callable[[HiddenStateCache], object]] = [
        lambda cache: cache.gather(torch.tensor([1999])),
        lambda cache: cache.states("cpu", torch.tensor([1999])),
        lambda cache: cache.states("cpu"),
        lambda cache: cache.warm(),
        lambda cache: cache.to("cpu", "resident"),
        lambda cache: (cache.touch(torch.tensor([1999])), cache._reader.wait()),
    ]
    for number, use in enumerate(uses):
        folder = tmp_path / str(number)
        write_cache(folder, states)
        cache, known = (HiddenStateCache.open(folder, verify=verify) for _ in range(2))
        known.gather(torch.arange(2000))
        os.truncate(folder / "text.states.bin", 4096)
        for opened in (cache, known):
            with pytest.raises(CorruptCacheError, match=r"text\.states\.bin: expected 192000 .* got 4096"):
                use(opened)
        assert cache.present.all(dim=1)[1:].all(), "small files are in memory"


# -- damage does not look sound once it is copied -----------------------------------------------------------


def append(folder: Path, first: int, count: int) -> None:
    """A cache of precomputed rows that follow from their number; old rows are encoded again."""
    states = torch.arange(count, dtype=torch.float32)[:, None, None] + torch.zeros(count, 2, 3)
    states[: max(first, 1)] += first
    np.save(folder / "a.npy", states.numpy())
    items = ItemTable([f"i{k}" for k in range(count)], {}, folder)
    build_cache(items, [f"a={folder / 'a.npy'}:precomputed"], folder / "c", dtype="fp32", progress=False)


@pytest.mark.parametrize("name", ["a.states.bin", "items.txt", "present.bin", "digests.bin"])
def test_what_is_derived_from_a_damaged_cache_is_refused(tmp_path: Path, name: str) -> None:
    append(tmp_path, 0, 6)
    flip(tmp_path / "c" / name, (tmp_path / "c" / name).stat().st_size - 3)
    before = (tmp_path / "c" / "meta.json").read_bytes()
    with pytest.raises(CorruptCacheError, match=f"{name}: its bytes differ from what was written"):
        append(tmp_path, 2, 9)
    assert (tmp_path / "c" / "meta.json").read_bytes() == before


# -- the description and the journal, forged ----------------------------------------------------------------


def modality(body: dict[str, Any], **changes: Any) -> None:
    body["modalities"][0].update(changes)


def swap(body: dict[str, Any]) -> None:
    modality(body, width=2, levels=6)


def rename(body: dict[str, Any], name: str) -> None:
    body["files"][name] = body["files"].pop("text.states.bin")


def split_sizes(body: dict[str, Any]) -> None:
    ((size, digest),) = body["files"]["present.bin"]
    body["files"]["present.bin"] = [[size + 8, digest], [-8, digest]]


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "text for a count": lambda body: body.update(num_items="9"),
    "a fraction": lambda body: body.update(num_items=9.9),
    "a whole fraction": lambda body: body.update(num_items=9.0),
    "bool for a count": lambda body: body.update(num_items=True),
    "a negative count": lambda body: body.update(num_items=-1),
    "a count beyond all": lambda body: body.update(num_items=1 << 70),
    "bool for a version": lambda body: body.update(version=True),
    "levels and width swapped": swap,
    "text for a width": lambda body: modality(body, width="6"),
    "bool for levels": lambda body: modality(body, levels=True),
    "hundreds of levels": lambda body: modality(body, levels=384, width=7),
    "levels that its layers are not": lambda body: modality(body, source={"layers": [0, 1, 2]}),
    "one name twice": lambda body: modality(body, name="audio"),
    "a name that is a path": lambda body: modality(body, name="../text"),
    "no modalities": lambda body: body.update(modalities=[]),
    "a mapping of modalities": lambda body: body.update(modalities={"text": 1}),
    "an absolute file": lambda body: rename(body, "/etc/passwd"),
    "a file elsewhere": lambda body: rename(body, "../c/text.states.bin"),
    "a file too many": lambda body: body["files"].update({"more.bin": []}),
    "no files": lambda body: body.update(files={}),
    "sizes below zero that sum up": split_sizes,
    "a size as text": lambda body: body["files"].update({"present.bin": [["20", "0" * 64]]}),
    "a segment of one": lambda body: body["files"].update({"present.bin": [[20]]}),
    "no checksum": lambda body: body["files"].update({"present.bin": [[20, 7]]}),
    "versions as text": lambda body: body.update(versions={"present.bin": "1"}),
    "versions below zero": lambda body: body.update(versions={"present.bin": -1}),
    "versions that are a path": lambda body: body.update(versions={"present.bin": "../../1"}),
    "full width below the basis": lambda body: modality(body, full_width=2),
    "centred as text": lambda body: modality(body, centred="no"),
    "centred without a centre": lambda body: modality(body, centred=True),
    "a dtype that is a list": lambda body: body.update(dtype=["int8"]),
    "a source that is none": lambda body: modality(body, source=3),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_description_is_refused_by_type_and_range(folder: Path, what: str) -> None:
    forge(folder, lambda body: None)
    HiddenStateCache.open(folder)
    forge(folder, FORGERIES[what])
    for use in (HiddenStateCache.open, verify_cache):
        with pytest.raises(CacheError, match=r"meta\.json"):
            use(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1, 2]", "null", '{"format": 1e999}', '"\\ud800"', "1" * 5000, "", "\xff\xfe"]
)
def test_a_description_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(CacheError, match=r"meta\.json"):
        HiddenStateCache.open(folder)


def test_a_description_of_any_length_is_not_read(folder: Path) -> None:
    os.truncate(folder / "meta.json", 1 << 40)
    with pytest.raises(CorruptCacheError, match=r"meta\.json: expected at most \d+ bytes, got more"):
        HiddenStateCache.open(folder)


def test_what_cannot_be_opened_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="many: levels: expected a whole number from 1 to 256, got 300"):
        write_cache(tmp_path / "c", {"many": torch.zeros(3, 300, 2)})
    assert not (tmp_path / "c").exists()


JOURNALS: dict[str, Callable[[dict[str, Any]], object]] = {
    "items beyond memory": lambda body: body.update(items=1 << 45),
    "items as text": lambda body: body.update(items="6"),
    "items below zero": lambda body: body.update(items=-6),
    "more spared than there are": lambda body: body.update(spared=7),
    "no fingerprint": lambda body: body.update(fingerprints=[]),
    "broken beyond the items": lambda body: body.update(broken={"a": {"6": "gone"}}),
    "broken as a list": lambda body: body.update(broken=[1]),
    "a plan that is none": lambda body: body.update(plan=3),
    "bits that are none": lambda body: body.update(done=["%%%"]),
    "passes too many": lambda body: body.update(done=body["done"] * 2, fingerprints=["", ""]),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_forged_journal_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finish.Outcome, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path, 0, 6)
    path = tmp_path / "c" / "building.json"
    body = json.loads(path.read_text())
    JOURNALS[what](body)
    path.write_text(json.dumps(body))
    with pytest.raises(CacheError, match=r"building\.json: .*begin anew with restart=True"):
        append(tmp_path, 0, 6)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


# -- segments ----------------------------------------------------------------------------------------------


def test_segments_are_small_and_few() -> None:
    for size in (0, 1, 1 << 20, (1 << 20) + 1, 3 << 30, 100 << 30, 4 << 40):
        ranges = list(segment_ranges(5, 5 + size))
        assert [start for start, _ in ranges] == [5, *(stop for _, stop in ranges)][: len(ranges)]
        assert sum(stop - start for start, stop in ranges) == size
        assert len(ranges) <= max(1024, size // (64 << 20))
        assert not size or ranges[0][1] - ranges[0][0] <= max(1 << 20, size // 512)


def test_segments_of_any_size_are_read(folder: Path) -> None:
    """As earlier versions wrote them, 64 MiB each, and as an appended file has them."""
    meta = read_meta(folder)
    whole = {
        name: (Segment(meta.committed(name), hashlib.sha256((folder / name).read_bytes()).hexdigest()),)
        for name in meta.segments
    }
    (folder / "meta.json").write_text(dataclasses.replace(meta, segments=whole).to_json())
    use_all(HiddenStateCache.open(folder))
    flip(folder / "audio.states.bin", 50)
    with pytest.raises(CorruptCacheError, match=r"audio\.states\.bin: .* 0 to 59 \(rows 0 to 9\)"):
        HiddenStateCache.open(folder).gather(torch.tensor([1]))
