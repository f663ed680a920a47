"""Items whose texts or files change after they were encoded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import build, count_encodings, specs_of, subset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossan_fast._digests import digest_of
from crossan_fast.cache import BrokenItemError, CacheError, HiddenStateCache, convert_cache
from crossan_fast.cache.build import digests
from crossan_fast.cache.build.encoders import FrozenEncoder
from crossan_fast.cache.build.runner import Runner
from crossan_fast.data.items import ItemTable


@pytest.fixture
def own(items: ItemTable, tmp_path: Path) -> ItemTable:
    """The items with files of their own, which a test may change."""
    shutil.copytree(items.folder, tmp_path / "items")
    return dataclasses.replace(items, folder=tmp_path / "items")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))


def rows_of(folder: Path) -> dict[str, Tensor]:
    cache = HiddenStateCache.open(folder, verify=True)
    return {name: rows.clone() for name, rows in cache.gather(torch.arange(cache.num_items + 1)).items()}


def same_as_built_anew(folder: Path, items: ItemTable, modalities: Any) -> None:
    """Each row of `folder` is what a new cache has for its item."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        build(items, modalities, folder.with_name("anew"))
    anew, cache = HiddenStateCache.open(folder.with_name("anew")), HiddenStateCache.open(folder, verify=True)
    there, here = anew.rows_of(items.names), cache.rows_of(items.names)
    assert torch.equal(anew.present[there], cache.present[here])
    for name, truth in anew.gather(there).items():
        torch.testing.assert_close(cache.gather(here)[name], truth, rtol=1e-5, atol=2e-6)


def test_changed_inputs_are_encoded_again_and_nothing_else_is(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities, folder = specs_of(encoders), tmp_path / "c"
    build(subset(own, list(range(13))), modalities, folder)
    held, before = HiddenStateCache.open(folder), rows_of(folder)
    encoded = count_encodings(monkeypatch)
    assert build(subset(own, list(range(13))), modalities, folder).unchanged == 13 and not encoded
    picture(1).save(own.folder / "0.png")  # another image under the same name
    np.save(own.folder / "clip1.npy", np.load(own.folder / "clip2.npy"))
    picture(2).resize((22, 18)).save(own.folder / "clip0" / "frame2.png")  # one frame of a clip
    os.utime(own.folder / "2.png")  # touched alone
    later = subset(own, list(range(13, -1, -1)), title={12: "an old red lamp"}, video_path={12: "clip1.npy"})
    report = build(later, None, folder, dtype=None)
    assert dict(report.re_encoded) == {"text": 1, "image": 1, "video": 2, "audio": 0}
    assert (report.added, report.unchanged, report.num_items, report.not_listed) == (1, 11, 14, 0)
    assert sum(encoded) == 4 + 4  # the new item's four
    monkeypatch.undo()
    same_as_built_anew(folder, later, modalities)
    now = rows_of(folder)
    for name, changed in (("text", [2]), ("image", [1]), ("video", [1, 2]), ("audio", [])):
        differ = (now[name][:14] != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert differ == changed, name
        assert torch.equal(held.gather(torch.arange(14))[name], before[name])
    files = {path.name for path in folder.iterdir()}
    assert {name for name in files if "states" in name} == {
        "text.states.1.bin",
        "image.states.1.bin",
        "video.states.1.bin",
        "audio.states.bin",
    }
    assert files - {
        f"{m}.states{n}.bin" for m in ("text", "image", "video", "audio") for n in ("", ".1")
    } == {
        "digests.1.bin",
        "items.txt",
        "meta.json",
        "present.1.bin",
    }
    assert build(later, modalities, folder).unchanged == 14


def test_images_that_come_and_go(encoders: dict[str, Path], own: ItemTable, tmp_path: Path) -> None:
    modalities, folder = specs_of(encoders)[:2], tmp_path / "c"
    without = subset(own, list(range(14)), image_path={3: None, 4: "late.png"})
    with pytest.warns(UserWarning, match="2 lack 'image'"):
        build(without, modalities, folder)
    assert HiddenStateCache.open(folder).present[[4, 5]].tolist() == [[True, False]] * 2
    picture(3).save(own.folder / "late.png")
    later = subset(own, list(range(14)), image_path={4: "late.png", 6: None}, title={7: None})
    report = build(later, modalities, folder)
    assert dict(report.re_encoded) == {"text": 0, "image": 2}
    assert dict(report.emptied) == {"text": 1, "image": 1}
    same_as_built_anew(folder, later, modalities)
    lines = (folder / "report.tsv").read_text().split("\n")
    assert lines[1:] == ["item7\ttext\tempty title", "item6\timage\tempty image_path", ""]


def test_reasons_of_what_did_not_change_stay(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path
) -> None:
    modalities, folder = specs_of(encoders)[:2], tmp_path / "c"
    with pytest.warns(UserWarning, match="1 lack 'image'"):
        build(subset(own, list(range(14)), image_path={3: None}), modalities, folder)
    build(subset(own, list(range(14)), image_path={3: None}, title={3: "red"}), modalities, folder)
    assert (folder / "report.tsv").read_text().split("\n")[1:] == ["item3\timage\tempty image_path", ""]


@pytest.mark.parametrize("spoil", ["cut", "gone", "nan"])
def test_a_changed_input_that_cannot_be_used_leaves_the_row(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    modalities, folder = specs_of(encoders)[:2], tmp_path / "c"
    build(own, modalities, folder)
    before, file = rows_of(folder), own.folder / "4.png"
    content = file.read_bytes()
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:80])
    if spoil == "nan":
        picture(4).save(file)
        states = FrozenEncoder.states
        monkeypatch.setattr(
            FrozenEncoder,
            "states",
            lambda self, inputs: ([h * np.nan for h in states(self, inputs)[0]], None),
        )
    with pytest.raises(BrokenItemError, match="item 'item4': modality 'image'"):
        build(own, modalities, folder, strict=True, restart=True)
    with pytest.warns(UserWarning, match="1 of 'image': inputs that changed cannot be used, .* 'item4'"):
        report = build(own, modalities, folder, restart=True)
    assert dict(report.kept) == {"text": 0, "image": 1} and dict(report.re_encoded) == {"text": 0, "image": 0}
    assert all(torch.equal(rows, before[name]) for name, rows in rows_of(folder).items())
    assert HiddenStateCache.open(folder).present[1:].all()
    assert "item4\timage\t" in (report_file := folder / "report.tsv").read_text()
    assert report_file.read_text().endswith("; its earlier state is kept\n")
    monkeypatch.undo()
    picture(5).save(file)
    assert build(own, modalities, folder).re_encoded["image"] == 1
    assert "item4" not in report_file.read_text()
    same_as_built_anew(folder, own, modalities)


def forget_digests(folder: Path) -> None:
    """As a cache of version 1 was written."""
    body = json.loads((folder / "meta.json").read_text())
    del body["sha256"], body["files"]["digests.bin"], body["versions"]
    body["version"] = 1
    body["sha256"] = digest_of(body)
    (folder / "meta.json").write_text(json.dumps(body))
    (folder / "digests.bin").unlink()


def test_a_cache_without_digests_says_so_and_can_be_told(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path
) -> None:
    modalities, folder = specs_of(encoders)[:2], tmp_path / "c"
    with pytest.warns(UserWarning, match="1 lack 'image'"):
        build(subset(own, list(range(13)), image_path={5: None}), modalities, folder)
    forget_digests(folder)
    before = rows_of(folder)
    later = subset(own, list(range(14)), title={1: "a red lamp", 2: "a blue lamp"})
    report = build(later, modalities, folder)
    assert (report.added, report.unknown, report.re_encoded["text"]) == (1, 13, 0)
    assert report.re_encoded["image"] == 1  # what was not there at all shows without digests
    assert torch.equal(rows_of(folder)["text"][:14], before["text"])
    report = build(later, modalities, folder, re_encode=["item1"])
    assert (report.unknown, dict(report.re_encoded)) == (12, {"text": 1, "image": 1})
    assert build(later, modalities, folder, re_encode="all").re_encoded["text"] == 14
    assert build(later, modalities, folder).unknown == 0
    same_as_built_anew(folder, later, modalities)
    with pytest.raises(KeyError, match="re_encode: no item 'item77' in the items file; did you mean"):
        build(later, modalities, folder, re_encode=["item77"])
    with pytest.raises(ValueError, match="re_encode: expected names of items or 'all', got 'item1'"):
        build(later, modalities, folder, re_encode="item1")


def test_no_row_is_encoded_again_by_other_weights(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an encoder whose weights changed in its folder: rows of two makings would stand in one cache."""
    weights = shutil.copytree(encoders["bert"], tmp_path / "bert") / "model.safetensors"
    kept, folder = weights.read_bytes(), tmp_path / "c"
    build(subset(own, list(range(13))), [f"text={weights.parent}:levels=3"], folder)
    before, meta = rows_of(folder), (folder / "meta.json").read_bytes()
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    encoded, corrected = count_encodings(monkeypatch), subset(own, list(range(13)), title={1: "a red lamp"})
    for items, re_encode in ((own, "all"), (own, ["item2"]), (own, ()), (corrected, ())):
        with pytest.raises(CacheError, match=r"the encoder's weights differ .*, or build a new cache"):
            build(items, None, folder, re_encode=re_encode)
    assert not encoded and (folder / "meta.json").read_bytes() == meta
    assert torch.equal(rows_of(folder)["text"], before["text"])
    weights.write_bytes(kept)
    assert build(own, None, folder, re_encode="all").re_encoded["text"] == 13


def test_inputs_that_change_between_a_stop_and_going_on(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, folder = specs_of(encoders)[1:2], tmp_path / "c"
    states, calls = FrozenEncoder.states, []

    def stopped(self: FrozenEncoder, inputs: Any, *_: object) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        assert isinstance(self, FrozenEncoder)
        calls.append(len(inputs))
        return states(self, inputs)

    def stop() -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(FrozenEncoder, "states", stopped)
            with pytest.raises(KeyboardInterrupt):
                build(own, image, folder, re_encode="all")

    stop()
    picture(6).save(own.folder / "2.png")  # encoded already
    with monkeypatch.context() as patch:  # stopped once more, before anything is encoded
        patch.setattr(Runner, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(own, image, folder)
    assert build(own, image, folder).added == 14
    same_as_built_anew(folder, own, image)
    before = rows_of(folder)
    stop()
    assert all(torch.equal(rows, before[name]) for name, rows in rows_of(folder).items())
    picture(7).save(own.folder / "2.png")
    (folder / "image.states.1.bin").rename(folder / "lost")
    with pytest.raises(CacheError, match="the stopped build's file is missing or short"):
        build(own, image, folder, re_encode="all")
    (folder / "lost").rename(folder / "image.states.1.bin")
    assert build(own, image, folder, re_encode="all").re_encoded["image"] == 14
    shutil.rmtree(tmp_path / "anew")
    same_as_built_anew(folder, own, image)


def test_conversion_keeps_what_is_known_of_inputs(
    encoders: dict[str, Path], own: ItemTable, tmp_path: Path
) -> None:
    text = specs_of(encoders)[:1]
    build(own, text, tmp_path / "c")
    convert_cache(tmp_path / "c", tmp_path / "q", "int8")
    later = subset(own, list(range(14)), title={3: "an old chair"})
    report = build(later, None, tmp_path / "q", dtype=None)
    assert (report.unchanged, report.unknown, report.re_encoded["text"]) == (13, 0, 1)


def test_records_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    new = digests.of_file(file, bytes(32))
    assert any(new[:16]) and not any(new[16:])  # of a moment ago: its times prove nothing yet
    os.utime(file, (1e9, 1e9))
    file.write_bytes(b"two")  # of the same size
    os.utime(file, (1e9, 1e9))
    assert digests.of_file(file, new)[:16] != new[:16]
    assert digests.of_file(tmp_path / "b.png", new) == digests.UNREADABLE
    assert len({new[:16], digests.of_bytes("text", b"one")[:16], digests.EMPTY[:16]}) == 3


def test_files_whose_times_are_known_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    monkeypatch.setattr(digests, "_TICK_NS", 0)
    record = digests.of_file(file, bytes(32))
    assert any(record[16:])
    file.chmod(0o000)
    file.chmod(0o644)  # another ctime, the same bytes
    again = digests.of_file(file, record)
    assert again[:16] == record[:16] and again[16:] != record[16:]
    monkeypatch.setattr("builtins.open", None)
    assert digests.of_file(file, again) == again
