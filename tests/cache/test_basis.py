"""Caches in a basis of their own: against NumPy's SVD, appended to, converted on, damaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cache_building import build, subset
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
from crossan_fast.cache.basis import expand, project
from crossan_fast.cache.convert import expand_cache
from crossan_fast.cache.quantize import dequantize, quantize
from crossan_fast.data.items import ItemTable

LEVELS = 3


def decaying(items: int, width: int, seed: int) -> Tensor:
    """States `[items + 1, 3, width]` around a mean, whose levels differ in size and whose spectrum falls."""
    random = np.random.default_rng(seed)
    turned = np.linalg.qr(random.normal(size=(width, width)))[0]
    scales = np.exp(-0.4 * np.arange(width))
    states = (random.normal(size=(items, LEVELS, width)) + random.normal(size=width)) * scales @ turned
    states *= np.array([0.3, 1, 20])[:, None]
    return torch.from_numpy(np.pad(states, ((1, 0), (0, 0), (0, 0)))).float()


def leading(states: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Right singular vectors as rows, and singular values, of all rows with levels scaled to equal energy."""
    rows = states.double().numpy()
    rows = rows / np.sqrt((rows**2).sum(axis=(0, 2)))[:, None]
    _, values, vectors = np.linalg.svd(rows.reshape(-1, rows.shape[2]), full_matrices=False)
    return vectors, values


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Of 60 items, in tmp_path / "c", 50 of which have an image; read in many chunks."""
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 4 << 10)
    result = {"text": decaying(60, 24, 0), "image": decaying(60, 17, 1)}
    present = torch.rand(61, 2) < 0.8
    present[:, 0], present[0] = True, False
    result["image"] *= present[:, 1, None, None]
    names = [f"n{k}" for k in range(60)]
    write_cache(tmp_path / "c", result, present=present, item_names=names, sources={"text": {"encoder": "x"}})
    return result


def test_the_basis_is_that_of_the_exact_svd(tmp_path: Path, states: dict[str, Tensor]) -> None:
    errors = convert_cache(tmp_path / "c", tmp_path / "b", basis=6)
    before, cache = HiddenStateCache.open(tmp_path / "c"), HiddenStateCache.open(tmp_path / "b", verify=True)
    assert [(m.name, m.width, m.levels) for m in cache.modalities] == [("text", 6, 3), ("image", 6, 3)]
    assert "text 3×6 of 24" in repr(cache) and before.bases == {}
    assert torch.equal(cache.present, before.present) and cache.dtype == torch.float32
    assert list(cache.item_names) == list(before.item_names)
    rows = cache.gather(torch.arange(61))
    for name, old in states.items():
        vectors, values = leading(old)
        basis = cache.bases[name]
        assert basis.dtype == torch.float32 and basis.shape == (6, old.shape[2])
        along = (basis.double().numpy() * vectors[:6]).sum(axis=1)
        np.testing.assert_allclose(np.abs(along), 1, atol=1e-6)
        np.testing.assert_allclose((basis.double() @ basis.double().T).numpy(), np.eye(6), atol=3e-7)
        assert (basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)) > 0).all()
        truth = torch.einsum("ild,kd->ilk", old.double(), basis.double())
        assert torch.equal(rows[name], truth.float())
        assert not rows[name][0].any() and not rows[name][~cache.present[:, list(states).index(name)]].any()
        held = truth.square().sum(dim=(0, 2)) / old.double().square().sum(dim=(0, 2))
        assert cache.sources[name]["energy"] == pytest.approx(held.tolist(), abs=1e-6)
        energy = (values**2)[:6].sum() / (values**2).sum()
        assert np.mean(cache.sources[name]["energy"]) == pytest.approx(energy, abs=1e-6)
        lost = (truth @ basis.double() - old.double()).norm() / old.double().norm()
        assert errors[name] == pytest.approx(float(lost), rel=1e-5)
    assert cache.sources["text"]["encoder"] == "x" and "float" not in repr(cache.sources)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_energy_takes_the_fewest_dimensions_that_hold_it(
    tmp_path: Path, states: dict[str, Tensor], share: float
) -> None:
    convert_cache(tmp_path / "c", tmp_path / "b", "fp32", energy=share)
    for modality in HiddenStateCache.open(tmp_path / "b").modalities:
        held = np.cumsum(leading(states[modality.name])[1] ** 2)
        assert held[modality.width - 1] >= share * held[-1]
        assert modality.width == 1 or held[modality.width - 2] < share * held[-1]


def test_one_modality_alone(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "b", basis={"image": 5})
    cache = HiddenStateCache.open(tmp_path / "b", verify=True)
    assert [(m.width, m.name in cache.bases) for m in cache.modalities] == [(24, False), (5, True)]
    assert torch.equal(cache.gather(torch.arange(61))["text"], states["text"])
    convert_cache(tmp_path / "b", tmp_path / "b2", energy={"text": 0.9})
    both = HiddenStateCache.open(tmp_path / "b2", verify=True)
    assert torch.equal(both.bases["image"], cache.bases["image"]) and set(both.bases) == {"text", "image"}
    assert both.sources["image"]["energy"] == cache.sources["image"]["energy"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
def test_a_basis_and_then_a_dtype(tmp_path: Path, states: dict[str, Tensor], dtype: str) -> None:
    errors = convert_cache(tmp_path / "c", tmp_path / "both", dtype, basis=6)
    convert_cache(tmp_path / "c", tmp_path / "b", basis=6)
    convert_cache(tmp_path / "b", tmp_path / "then", dtype)
    both, then = (HiddenStateCache.open(tmp_path / name, verify=True) for name in ("both", "then"))
    for column, (name, old) in enumerate(states.items()):
        basis = both.bases[name]
        assert torch.equal(basis, then.bases[name])
        coordinates = project(old, basis)
        if dtype == "bf16":
            stored, back = coordinates.bfloat16(), coordinates.bfloat16().float()
        else:
            stored, scales = quantize(coordinates, both.dtype)
            back = dequantize(stored, scales)
        for cache in (both, then):
            found = cache.states("cpu")[column]
            assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8))
        lost = (expand(back, basis).double() - old.double()).norm() / old.double().norm()
        assert errors[name] == pytest.approx(float(lost), rel=1e-5)


def test_a_quantized_cache_gets_a_basis(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "q", "int8")
    convert_cache(tmp_path / "q", tmp_path / "b", basis=6)
    wide, cache = HiddenStateCache.open(tmp_path / "q"), HiddenStateCache.open(tmp_path / "b", verify=True)
    assert cache.dtype == torch.int8
    ids = torch.arange(61)
    expected, scales = quantize(project(wide.gather(ids)["text"], cache.bases["text"]), torch.int8)
    assert torch.equal(cache.gather(ids)["text"], dequantize(expected, scales))


def test_wide_again_is_the_projection(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "b", basis=6)
    before = {"image": HiddenStateCache.open(tmp_path / "b").frames["image"]}
    expand_cache(tmp_path / "b", tmp_path / "w", before)
    cache, wide = HiddenStateCache.open(tmp_path / "b"), HiddenStateCache.open(tmp_path / "w", verify=True)
    assert [m.width for m in wide.modalities] == [24, 6] and list(wide.bases) == ["image"]
    rows, kept = wide.gather(torch.arange(61)), cache.gather(torch.arange(61))
    assert torch.equal(rows["image"], kept["image"])
    onto = cache.bases["text"].double().T @ cache.bases["text"].double()
    torch.testing.assert_close(rows["text"].double(), states["text"].double() @ onto, rtol=1e-6, atol=1e-6)


def test_a_model_of_the_cache_is_as_wide_as_its_basis(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "b", "bf16", basis={"text": 6, "image": 4})
    cache = HiddenStateCache.open(tmp_path / "b")
    config = CrossanConfig(cache.modalities, embedding_dim=8, bottleneck=4)
    assert [tower.width for tower in config.towers] == [6, 4]
    assert CrossanModel(config, backend="eager").encode_catalogue(cache).shape == (61, 8)
    wide = CrossanModel(CrossanConfig(HiddenStateCache.open(tmp_path / "c").modalities), backend="eager")
    with pytest.raises(ValueError, match=r"width=24.*got.*width=6"):
        wide.encode_catalogue(cache)
    other = copy.deepcopy(cache)
    assert torch.equal(other.bases["text"], cache.bases["text"])


def test_memory_is_a_chunk_and_sums(
    tmp_path: Path, states: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a chunk of rows is in memory as floats at a time, whatever the cache holds."""
    seen: dict[str, list[int]] = {"level_energies": [], "project": []}

    def counted(name: str, module: Any) -> None:
        inner = getattr(module, name)

        def run(block: Tensor, *more: Any) -> Tensor:
            seen[name].append(block.numel() * 4)
            return inner(block, *more)

        monkeypatch.setattr(module, name, run)

    counted("level_energies", convert_module)
    counted("project", convert_module)
    from crossan_fast.cache import basis as basis_module

    counted("level_energies", basis_module)
    convert_cache(tmp_path / "c", tmp_path / "b", basis=6)
    whole = 61 * LEVELS * 24 * 4
    assert whole > 4 * (4 << 10) and max(map(max, seen.values())) <= 4 << 10
    assert sum(seen["project"]) == 61 * LEVELS * (24 + 17) * 4


def appendable(folder: Path, count: int, **more: Any) -> Any:
    """Build `c` from the first `count` of 30 rows of two arrays."""
    for seed, name in enumerate(("text", "audio")):
        np.save(folder / f"{name}.npy", more.get(name, decaying(30, 12 - 3 * seed, seed)[1:].numpy())[:count])
    items = ItemTable([f"i{k}" for k in range(count)], {}, folder)
    specs = [f"{name}={folder / name}.npy:precomputed" for name in ("text", "audio")]
    return build_cache(items, specs, folder / "b", dtype=more.get("dtype"), batch_size=7, progress=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_appended_and_corrected_items_land_in_the_basis(tmp_path: Path, dtype: str) -> None:
    texts, audios = decaying(30, 12, 0)[1:].numpy(), decaying(30, 9, 1)[1:].numpy()
    appendable(tmp_path, 20, dtype="fp32")
    (tmp_path / "b").rename(tmp_path / "wide")
    convert_cache(tmp_path / "wide", tmp_path / "b", dtype, basis={"text": 4})
    first = HiddenStateCache.open(tmp_path / "b")
    texts[3] += 1
    report = appendable(tmp_path, 30, text=texts)
    assert (report.added, dict(report.re_encoded)) == (10, {"text": 1, "audio": 0})
    cache = HiddenStateCache.open(tmp_path / "b", verify=True)
    assert torch.equal(cache.bases["text"], first.bases["text"])
    assert cache.sources["text"]["energy"] == first.sources["text"]["energy"]
    # What a cache would hold that had all of them from the start.
    expected = {
        "text": project(torch.from_numpy(texts), first.bases["text"]),
        "audio": torch.from_numpy(audios),
    }
    for name, rows in cache.gather(torch.arange(1, 31)).items():
        if dtype == "int8":
            truth = dequantize(*quantize(expected[name], torch.int8))
        else:
            truth = expected[name].to(cache.dtype)
        assert torch.equal(rows, truth), name
    assert appendable(tmp_path, 30, text=texts).unchanged == 30


def test_appending_with_the_caches_own_encoders(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    specs = [f"text={encoders['bert']}:levels=3", f"first={encoders['bert']}:levels=3:pool=cls"]
    build(items, specs, tmp_path / "wide")
    build(subset(items, list(range(10))), specs, tmp_path / "c")
    convert_cache(tmp_path / "c", tmp_path / "b", basis=8)
    assert build(items, None, tmp_path / "b").added == 4
    cache, wide = HiddenStateCache.open(tmp_path / "b", verify=True), HiddenStateCache.open(tmp_path / "wide")
    rows, states = cache.gather(torch.arange(15)), wide.gather(torch.arange(15))
    for name, basis in cache.bases.items():
        truth = project(states[name], basis)
        # The encoder's rounding depends on the batch.
        torch.testing.assert_close(rows[name], truth, rtol=1e-5, atol=5e-6)


def test_states_of_another_width_are_not_appended(tmp_path: Path) -> None:
    appendable(tmp_path, 20)
    (tmp_path / "b").rename(tmp_path / "wide")
    convert_cache(tmp_path / "wide", tmp_path / "b", basis=4)
    there = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    # As wide as the cache's rows are, which are no states.
    narrow = np.ones((30, LEVELS, 4), np.float32)
    with pytest.raises(
        CacheError, match=r"'text': the cache keeps 4 coordinates of states of width 12, got .* 4"
    ):
        appendable(tmp_path, 30, text=narrow)
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_a_flipped_bit_of_the_basis_is_found(tmp_path: Path) -> None:
    appendable(tmp_path, 20)
    (tmp_path / "b").rename(tmp_path / "wide")
    convert_cache(tmp_path / "wide", tmp_path / "b", basis=4)
    path = tmp_path / "b" / "text.basis.bin"
    sound = path.read_bytes()
    assert len(sound) == 4 * 12 * 4
    for place in (0, 77, 191):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert verify_cache(tmp_path / "b") == ["text.basis.bin: bytes 0 to 191 differ from what was written"]
        with pytest.raises(CorruptCacheError, match=r"is damaged: text\.basis\.bin"):
            HiddenStateCache.open(tmp_path / "b", verify=True)
        # Whatever reads it: coordinates in another basis would look as sound as the others.
        for use in (
            lambda: HiddenStateCache.open(tmp_path / "b"),
            lambda: appendable(tmp_path, 30),
            lambda: convert_cache(tmp_path / "b", tmp_path / "q", "int8"),
        ):
            with pytest.raises(CorruptCacheError, match=r"text\.basis\.bin: its bytes differ from what was"):
                use()
    path.write_bytes(sound[:-1])
    with pytest.raises(CorruptCacheError, match=r"text\.basis\.bin: expected 192 bytes, got 191"):
        HiddenStateCache.open(tmp_path / "b")
    path.write_bytes(sound)
    assert verify_cache(tmp_path / "b") == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "dtype, basis, energy, centre: expected at least one of them, got none"),
        (
            {"basis": 4, "energy": 0.9},
            ValueError,
            "basis, energy: expected one of them, got basis=4 and energy",
        ),
        ({"basis": {}}, ValueError, r"basis: expected a number, or at least one modality's, got \{\}"),
        (
            {"basis": 0},
            ValueError,
            "basis: modality 'text': expected a number of dimensions from 1 to 23, .*got 0",
        ),
        ({"basis": 17}, ValueError, "basis: modality 'image': .* from 1 to 16, below its width, got 17"),
        ({"basis": 4.0}, ValueError, "basis: modality 'text': expected a number of dimensions .*, got 4.0"),
        ({"basis": True}, ValueError, "basis: modality 'text': expected a number of dimensions .*, got True"),
        ({"basis": {"tex": 4}}, ValueError, r"basis: unknown modality 'tex', .*; did you mean 'text'\?"),
        (
            {"energy": {"text": 1.0}},
            ValueError,
            "energy: modality 'text': expected a share above 0 and below 1",
        ),
        (
            {"energy": 0.0},
            ValueError,
            "energy: modality 'text': expected a share above 0 and below 1, got 0.0",
        ),
        ({"energy": 2}, ValueError, "energy: modality 'text': expected a share above 0 and below 1, got 2"),
        ({"energy": float("nan")}, ValueError, "energy: .*got nan"),
        (
            {"energy": 1 - 1e-9},
            ValueError,
            "energy: modality 'text': 0.999999999 of it takes all 24 dimensions",
        ),
    ],
)
def test_bases_that_cannot_be(
    tmp_path: Path, states: dict[str, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_cache(tmp_path / "c", tmp_path / "b", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_basis_of_a_basis_and_of_nothing(tmp_path: Path, states: dict[str, Tensor]) -> None:
    convert_cache(tmp_path / "c", tmp_path / "b", basis={"text": 6})
    for options in ({"basis": 3}, {"energy": 0.5}):
        with pytest.raises(
            ValueError, match="modality 'text' is stored in a basis already, 6 of 24 dimensions"
        ):
            convert_cache(tmp_path / "b", tmp_path / "d", **options)  # type: ignore[arg-type]
    write_cache(tmp_path / "z", {"text": torch.zeros(5, 2, 6)})
    with pytest.raises(ValueError, match="basis: modality 'text' has no state other than zero"):
        convert_cache(tmp_path / "z", tmp_path / "d", basis=3)
    huge = torch.full((5, 2, 6), 6e4)
    huge[0] = 0
    write_cache(tmp_path / "h", {"text": huge}, dtype="fp16")
    with pytest.raises(ValueError, match=r"NaN or inf \(once stored as fp16\) in 4 rows, first in row 1"):
        convert_cache(tmp_path / "h", tmp_path / "d", basis=3)
    write_cache(tmp_path / "l", {"text": huge * torch.tensor([[0.0], [1.0]])})
    convert_cache(tmp_path / "l", tmp_path / "d", basis=3)  # a level of zeros loses nothing
    assert HiddenStateCache.open(tmp_path / "d").sources["text"]["energy"] == [1, 1]
