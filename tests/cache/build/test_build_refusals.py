"""Inputs, encoders and requests that cannot be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import build, specs_of, subset
from torch import Tensor

from crossan_fast.cache import (
    BrokenItemError,
    CacheError,
    HiddenStateCache,
)
from crossan_fast.cache.build.encoders import FrozenEncoder
from crossan_fast.data.items import ItemTable


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
        ([f"a={bert}x"], FileNotFoundError, rf"encoder: no such folder: .*; did you mean {bert}\?"),
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


def test_a_misspelt_encoder_folder_is_said_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoders" / "text").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(
        "crossan_fast.cache.build.encoders.FrozenEncoder._pretrained", lambda *a: asked.append(a)
    )
    for source, hint in (
        ("encoders/texxt", r"; did you mean encoders/text\?"),
        ("encoder/text/", r"; did you mean encoders/text\?"),
        ("a/b/c", "$"),
        ("~/nowhere-at-all", "$"),
        ("../nowhere-at-all", "$"),
    ):
        with pytest.raises(FileNotFoundError, match=f"encoder: no such folder: {source}{hint}"):
            FrozenEncoder(source)
    assert not asked


def test_options_of_texts_stay_those_of_the_cache(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    """Not given they are the cache's own, whoever names the modality; given otherwise they are refused."""
    out, spec = tmp_path / "c", f"text={encoders['bert']}:levels=3"
    build(subset(items, [0, 1]), [spec], out, max_length=9, lowercase=True)
    for modalities, options, message in (
        (None, {"max_length": 12}, "text: max_length 9, not 12"),
        ([spec], {"max_length": 30}, "text: max_length 9, not 30"),
        (None, {"lowercase": False}, "text: lowercase True, not False"),
        ([f"{spec}:lowercase=false"], {"lowercase": True}, "text: lowercase True, not False"),
    ):
        with pytest.raises(CacheError, match=f"was built with {message}"):
            build(items, modalities, out, **options)
    assert build(subset(items, [0, 1, 2]), None, out, max_length=9).added == 1
    assert build(subset(items, [0, 1, 2, 3]), [spec], out).added == 1
    source = HiddenStateCache.open(out).sources["text"]
    assert (source["max_length"], source["lowercase"]) == (9, True)
