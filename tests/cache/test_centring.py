"""Centred caches: against NumPy, in a basis, appended to, converted on, damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel
from crossan_fast.cache import (
    CacheError,
    CorruptCacheError,
    HiddenStateCache,
    build_cache,
    convert_cache,
    verify_cache,
    write_cache,
)
from crossan_fast.cache import convert as convert_module
from crossan_fast.cache.convert import expand_cache
from crossan_fast.cache.quantize import dequantize, quantize
from crossan_fast.data.items import ItemTable

ITEMS, LEVELS = 60, 3


def lopsided(items: int, width: int, seed: int) -> Tensor:
    """States `[items + 1, 3, width]` far from the origin, levels of several sizes, the first the same."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(items, LEVELS, width)) + 20 * random.normal(size=(LEVELS, width))
    states *= np.array([1.0, 0.02, 30])[:, None]
    states[:, 0] = states[0, 0]
    return torch.from_numpy(np.pad(states, ((1, 0), (0, 0), (0, 0)))).float()


def centred(states: Tensor, present: Tensor) -> npt.NDArray[np.float64]:
    """As the definition says, of the items that have the modality."""
    rows = states.double().numpy()
    out = np.zeros_like(rows)
    known = rows[present.numpy()]
    known = known - known.mean(axis=0)
    for level in range(1, LEVELS):
        known[:, level] /= np.sqrt((known[:, level] ** 2).mean())
    known[:, 0] = 0
    out[present.numpy()] = known
    return out


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """In tmp_path / "c", most of whose items have an image; read in many chunks."""
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 4 << 10)
    result = {"text": lopsided(ITEMS, 24, 0), "image": lopsided(ITEMS, 17, 1)}
    present = torch.rand(ITEMS + 1, 2, generator=torch.Generator().manual_seed(0)) < 0.8
    present[:, 0], present[0] = True, False
    result["image"] *= present[:, 1, None, None]
    write_cache(tmp_path / "c", result, present=present, sources={"text": {"encoder": "x"}})
    return result


def test_each_level_is_centred_and_of_one_size(tmp_path: Path, states: dict[str, Tensor]) -> None:
    errors = convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    before, cache = HiddenStateCache.open(tmp_path / "c"), HiddenStateCache.open(tmp_path / "z", verify=True)
    assert [replace(m, frame="") for m in cache.modalities] == list(before.modalities)
    assert cache.modalities[0].frame == cache.frames["text"].digest() and "24, centred" in repr(cache)
    assert cache.item_names == before.item_names
    assert torch.equal(cache.present, before.present) and cache.dtype == torch.float32
    rows = cache.gather(torch.arange(ITEMS + 1))
    for column, (name, old) in enumerate(states.items()):
        np.testing.assert_allclose(rows[name].numpy(), centred(old, cache.present[:, column]), atol=2e-5)
        assert not rows[name][~cache.present[:, column]].any() and not rows[name][:, 0].any()
        assert errors[name] == 0
        # What is said of the cache brings an encoder's states there, and back.
        there = cache.present[:, column]
        assert torch.equal(cache.frames[name].project(old)[there], rows[name][there])
        back = cache.frames[name].expand(rows[name])[there]
        torch.testing.assert_close(back, old[there], rtol=1e-5, atol=1e-5)
    assert cache.bases == {} and cache.sources["text"]["encoder"] == "x"


def test_one_modality_alone_and_then_the_other(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "one", centre=["image"])
    one = HiddenStateCache.open(tmp_path / "one", verify=True)
    assert list(one.frames) == ["image"]
    assert torch.equal(one.gather(torch.arange(ITEMS + 1))["text"], states["text"])
    convert_cache(tmp_path / "one", tmp_path / "both", centre=["text"])
    convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    both, z = (HiddenStateCache.open(tmp_path / name, verify=True) for name in ("both", "z"))
    for name, rows in both.gather(torch.arange(ITEMS + 1)).items():
        assert torch.equal(rows, z.gather(torch.arange(ITEMS + 1))[name])
        assert both.frames[name].digest() == z.frames[name].digest()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_basis_is_that_of_centred_states(tmp_path: Path, states: dict[str, Tensor], dtype: str) -> None:
    convert_cache(tmp_path / "c", tmp_path / "once", dtype, centre=True, basis=6)
    convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    convert_cache(tmp_path / "z", tmp_path / "then", dtype, basis=6)
    once, then = (HiddenStateCache.open(tmp_path / name, verify=True) for name in ("once", "then"))
    for column, (name, old) in enumerate(states.items()):
        truth = centred(old, once.present[:, column])
        # The leading directions of both levels that differ, alike in size.
        _, _, vectors = np.linalg.svd(truth.reshape(-1, truth.shape[2]), full_matrices=False)
        along = (once.bases[name].double().numpy() * vectors[:6]).sum(axis=1)
        np.testing.assert_allclose(np.abs(along), 1, atol=1e-5)
        assert once.frames[name].digest() == then.frames[name].digest()
        assert torch.equal(once.states("cpu")[column], then.states("cpu")[column])
        coordinates = torch.from_numpy(truth) @ once.bases[name].double().T
        if dtype == "int8":
            coordinates = dequantize(*quantize(coordinates.float(), torch.int8)).double()
        kept = once.gather(torch.arange(ITEMS + 1))[name].double()
        torch.testing.assert_close(kept, coordinates, atol=4e-5 if dtype == "fp32" else 0.05, rtol=1e-4)


def test_as_it_was_again(tmp_path: Path, states: dict[str, Tensor]) -> None:
    """What a model of the old cache is judged on keeps absent items absent."""
    convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    expand_cache(tmp_path / "z", tmp_path / "again", {})
    again = HiddenStateCache.open(tmp_path / "again", verify=True)
    assert again.frames == {}
    for name, rows in again.gather(torch.arange(ITEMS + 1)).items():
        torch.testing.assert_close(rows, states[name], rtol=1e-5, atol=1e-5)
    convert_cache(tmp_path / "z", tmp_path / "b", basis={"text": 23})
    z = HiddenStateCache.open(tmp_path / "z")
    expand_cache(tmp_path / "b", tmp_path / "wide", z.frames)
    wide = HiddenStateCache.open(tmp_path / "wide", verify=True)
    assert {name: f.digest() for name, f in wide.frames.items()} == {
        name: f.digest() for name, f in z.frames.items()
    }
    assert wide.modalities == z.modalities


def appended(folder: Path, count: int, texts: npt.NDArray[np.float32]) -> Any:
    """Build `b` from the first `count` of 30 rows of an array."""
    np.save(folder / "text.npy", texts[:count])
    items = ItemTable([f"i{k}" for k in range(count)], {}, folder)
    return build_cache(items, [f"text={folder / 'text.npy'}:precomputed"], folder / "b", progress=False)


@pytest.mark.parametrize("basis", [None, 5])
def test_appended_and_corrected_items_land_where_the_others_are(tmp_path: Path, basis: int | None) -> None:
    texts = lopsided(30, 12, 0)[1:].numpy()
    appended(tmp_path, 20, texts)
    (tmp_path / "b").rename(tmp_path / "raw")
    convert_cache(tmp_path / "raw", tmp_path / "b", "fp32", centre=True, basis=basis)
    frame = HiddenStateCache.open(tmp_path / "b").frames["text"]
    texts[3] += 1
    report = appended(tmp_path, 30, texts)
    assert (report.added, dict(report.re_encoded)) == (10, {"text": 1})
    cache = HiddenStateCache.open(tmp_path / "b", verify=True)
    assert cache.frames["text"].digest() == frame.digest()
    new = [0, *range(4, 5), *range(21, 31)]
    expected = frame.project(torch.from_numpy(texts))
    rows = cache.gather(torch.arange(31))["text"]
    for row in new[1:]:
        assert torch.equal(rows[row], expected[row - 1]), row
    assert appended(tmp_path, 30, texts).unchanged == 30
    with pytest.raises(CacheError, match=r"keeps (5 coordinates of|centred) states of width 12, got .* 7"):
        appended(tmp_path, 30, np.ones((30, LEVELS, 7), np.float32))


def test_damage_and_older_versions(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "z", centre=["text"])
    said = json.loads((tmp_path / "z" / "meta.json").read_text())
    assert said["version"] == 3  # what reads 2 alone refuses it
    assert json.loads((tmp_path / "c" / "meta.json").read_text())["version"] == 2
    path = tmp_path / "z" / "text.centre.bin"
    sound = path.read_bytes()
    assert len(sound) == LEVELS * 25 * 4
    damaged = bytearray(sound)
    damaged[30] ^= 1
    path.write_bytes(damaged)
    assert verify_cache(tmp_path / "z") == ["text.centre.bin: bytes 0 to 299 differ from what was written"]
    with pytest.raises(CorruptCacheError, match=r"text\.centre\.bin: its bytes differ"):
        HiddenStateCache.open(tmp_path / "z")
    path.unlink()
    with pytest.raises(CorruptCacheError, match=r"text\.centre\.bin: expected 300 bytes, got no such file"):
        HiddenStateCache.open(tmp_path / "z")
    path.write_bytes(sound)
    assert verify_cache(tmp_path / "z") == []


def test_what_cannot_be_centred(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "z", centre=["image"], basis={"text": 4})
    for asked, message in (
        (["image"], "centre: modality 'image' is centred already"),
        (["text"], "centre: modality 'text' is stored in a basis already"),
        (["imag"], r"centre: unknown modality 'imag', expected some of .* did you mean 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_cache(tmp_path / "z", tmp_path / "d", centre=asked)
    with pytest.raises(TypeError, match="centre: expected true, false or a list of names, got 'text'"):
        convert_cache(tmp_path / "c", tmp_path / "d", centre="text")
    absent = torch.zeros(5, 2, dtype=torch.bool)
    absent[1:, 0] = True
    write_cache(
        tmp_path / "n",
        {"a": torch.ones(5, 1, 4) * absent[:, :1, None], "b": torch.zeros(5, 1, 4)},
        present=absent,
    )
    with pytest.raises(ValueError, match="centre: modality 'b': expected two items that have it, got 0"):
        convert_cache(tmp_path / "n", tmp_path / "d", centre=True)
    assert not (tmp_path / "d").exists()


def test_tiny_states_do_not_overflow(tmp_path: Path) -> None:
    states = torch.rand(9, 2, 4) * 1e-30
    states[:, 1] *= 1e-12  # subnormal
    states[0] = 0
    write_cache(tmp_path / "c", {"a": states})
    convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    rows = HiddenStateCache.open(tmp_path / "z").gather(torch.arange(9))["a"]
    assert rows[1:, 0].square().mean().item() == pytest.approx(1, rel=1e-5) and not rows[:, 1].any()


@pytest.mark.parametrize(("dtype", "flat"), [("fp32", 0), ("fp16", 1), ("bf16", 2), ("int8", 3), ("fp8", 4)])
def test_rounding_is_not_made_of_one_size(tmp_path: Path, dtype: str, flat: int) -> None:
    """Levels whose states differ by less than their type can say become zeros, the others do not."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1, 64, generator=random)
    sizes = torch.tensor([2e-4, 2e-3, 6e-3, 2e-2, 0.5])[
        :, None
    ]  # of what differs, each above the next type's step
    states = common + sizes * torch.randn(201, 5, 64, generator=random)
    states[0] = 0
    write_cache(tmp_path / "c", {"a": states}, dtype=dtype)
    convert_cache(tmp_path / "c", tmp_path / "z", "fp32", centre=True)
    scale = HiddenStateCache.open(tmp_path / "z").frames["a"].centring
    assert scale is not None and (scale.scale > 0).tolist() == [level >= flat for level in range(5)]


def test_a_model_reads_states_in_its_own_frame_alone(tmp_path: Path, states: dict[str, Tensor]) -> None:
    """Without a run, too: states of the same shape that mean others."""
    convert_cache(tmp_path / "c", tmp_path / "z", centre=True)
    convert_cache(tmp_path / "c", tmp_path / "one", centre=["text"])
    raw, z, one = (HiddenStateCache.open(tmp_path / name) for name in ("c", "z", "one"))
    model = CrossanModel(CrossanConfig(z.modalities, embedding_dim=8, bottleneck=4), backend="eager")
    model.save_pretrained(tmp_path / "m")
    model = CrossanModel.from_pretrained(tmp_path / "m", backend="eager")
    assert model.encode_catalogue(z).shape == (ITEMS + 1, 8)
    model.set_popularity(torch.ones(ITEMS + 1), z.catalogue)
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert model(ids, cache=z).loss.isfinite()
    for use in (
        lambda: model.encode_catalogue(raw),
        lambda: model(ids, cache=raw),
        lambda: model.recommend([["1", "2"]], raw),
        lambda: model.explain(None, raw),
    ):
        with pytest.raises(ValueError, match=r"'text': expected states centred as .*, got .* not centred"):
            use()
    with pytest.raises(ValueError, match=r"'image': expected states centred as .*, got .* not centred"):
        model.encode_catalogue(one)
    plain = CrossanConfig(raw.modalities, embedding_dim=8)
    assert "frame" not in plain.to_json()
    with pytest.raises(ValueError, match=r"'text': expected states that are not centred, .*got"):
        CrossanModel(plain, backend="eager").encode_catalogue(z)
    with pytest.raises(ValueError, match="frame: expected a digest as text, got 7"):
        replace(z.modalities[0], frame=7)  # type: ignore[arg-type]


def test_states_of_another_shape_are_not_projected(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "z", centre=["text"], basis={"image": 4})
    frames = HiddenStateCache.open(tmp_path / "z").frames
    assert frames["image"].project(torch.randn(5, 2, 17)).shape == (5, 2, 4)  # a basis is of every level
    for name, shape, expected in (
        ("text", (5, 1, 24), "3, 24"),
        ("text", (24,), "3, 24"),
        ("image", (5, 16), "[?], 17"),
    ):
        with pytest.raises(ValueError, match=rf"states: expected \[\.\.\., {expected}\], got"):
            frames[name].project(torch.randn(shape))
