"""A model of imported states reads no others of the same items and widths: a run has a sample of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossan_fast import HiddenStateCache
from crossan_fast._digests import sealed
from crossan_fast.cache import convert_cache, import_features, write_cache
from crossan_fast.cli import main
from crossan_fast.data.items import ItemTable
from crossan_fast.training import RunFolder, TrainConfig, Trainer
from crossan_fast.training.samples import refuse_other_rows, sample_of

OTHERS = (
    r"cache: modality '(text|image)': expected the imported states that the run was trained on, got others"
)
NAMES = ("text", "image")


def fit(settings: dict[str, Any], *, resume: bool = False, **changes: Any) -> RunFolder:
    trainer = Trainer(TrainConfig.from_dict({**settings, **changes}))
    trainer.fit(progress=False, say=lambda line: None, resume=resume)
    return trainer.folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Tensor]:
    """Two modalities of one width, in `text.npy` and `image.npy`, of the world's items in its order."""
    generator = torch.Generator().manual_seed(4)
    states = {name: torch.randn(30, 3, 24, generator=generator).abs() for name in NAMES}
    for name, rows in states.items():
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    return states


def imported(values: dict[str, Any], folder: Path, out: str, items: int | None = None, **sources: str) -> str:
    """A cache of the files that `sources` names for each modality, of the first so many items."""
    names = list(HiddenStateCache.open(values["cache"]).item_names[1:])[:items]
    if items is not None:
        for name in NAMES:
            np.save(folder / f"first-{name}.npy", np.load(folder / f"{name}.npy")[:items])
    first = "" if items is None else "first-"
    paths = {name: folder / f"{first}{sources.get(name, name)}.npy" for name in NAMES}
    import_features(paths, folder / out, items=ItemTable(names, {}), dtype="fp32", progress=False)
    return str(folder / out)


@pytest.mark.usefixtures("files")
def test_imported_files_of_one_width_that_were_swapped(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**values, "cache": imported(values, tmp_path, "own"), "epochs": 1}
    run = fit(settings)
    swapped = imported(values, tmp_path, "swapped", text="image", image="text")
    of = ("--run", settings["run"], "--cache", swapped)
    convert = ("cache", "convert", swapped, "--out", str(tmp_path / "x"), "--dtype", "int8", "--no-progress")
    for command in (
        ["evaluate", *of],
        ["recommend", *of, "--history", "item3"],
        ["export", settings["run"], "--cache", swapped, "--embeddings", str(tmp_path / "items.npy")],
        [*convert, "--run", settings["run"]],
    ):
        assert main(command) == 2, command
        assert "modality 'text': expected the imported states that the" in capsys.readouterr().err
    with pytest.raises(ValueError, match=OTHERS):
        fit(settings, cache=swapped, resume=True, epochs=2)
    with pytest.raises(ValueError, match=OTHERS):
        fit(settings, cache=swapped, init_from=str(run.path), run=str(tmp_path / "behind"))
    one = imported(values, tmp_path, "one", image="text")  # of what a model does not read it is no matter
    fit(settings, cache=one, modalities=["text"], run=str(tmp_path / "text"))
    fit(settings, cache=settings["cache"], modalities=["text"], run=str(tmp_path / "text"), resume=True)
    with pytest.raises(ValueError, match=OTHERS):
        fit(settings, cache=one, resume=True, epochs=2)


def test_the_same_states_in_another_cache_go_on(
    values: dict[str, Any], files: dict[str, Tensor], tmp_path: Path
) -> None:
    """Stored otherwise, grown, corrected in part, computed once more, without a record of its making."""
    settings = {**values, "cache": imported(values, tmp_path, "own", items=26), "epochs": 1}
    run = fit(settings, min_items=3)
    held, names = run.read_population(), list(HiddenStateCache.open(values["cache"]).item_names[1:])
    assert held is not None
    for dtype in ("int8", "fp8", "bf16"):
        convert_cache(settings["cache"], tmp_path / dtype, dtype)
    imported(values, tmp_path, "own")  # appends
    again = {name: rows * (1 + 1e-2 * torch.randn_like(rows)) for name, rows in files.items()}
    padded = {name: torch.nn.functional.pad(rows, (0, 0, 0, 0, 1, 0)) for name, rows in again.items()}
    write_cache(tmp_path / "again", padded, item_names=names)
    corrected = np.load(tmp_path / "text.npy")
    corrected[:9] = np.random.default_rng(0).standard_normal((9, 3, 24))
    np.save(tmp_path / "text.npy", corrected)
    imported(values, tmp_path, "corrected")
    for folder in ("own", "int8", "fp8", "bf16", "again", "corrected"):
        held.require_states(HiddenStateCache.open(tmp_path / folder), NAMES)
    assert HiddenStateCache.open(tmp_path / "own").num_items == 30
    # Of other items a model may be asked: rows say nothing of theirs.
    turned = {name: torch.cat([rows[:1], rows[1:].flip(0)]) for name, rows in padded.items()}
    write_cache(tmp_path / "cold", turned, item_names=names[::-1])
    held.require_states(HiddenStateCache.open(tmp_path / "cold"), NAMES)
    corrected[:] = np.random.default_rng(1).standard_normal(corrected.shape)
    np.save(tmp_path / "text.npy", corrected)
    with pytest.raises(ValueError, match=OTHERS):
        held.require_states(HiddenStateCache.open(imported(values, tmp_path, "corrected")), NAMES)


@pytest.mark.parametrize("width", [8, 768, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_storage_moves_a_row_little_and_another_model_puts_it_elsewhere(width: int, seed: int) -> None:
    """Also where few dimensions are a thousand times as large as the others, in each model its own."""
    generator = torch.Generator().manual_seed(seed)

    def states() -> Tensor:
        large = torch.ones(width)
        large[torch.randperm(width, generator=generator)[:2]] = 1000
        mean = torch.randn(2, width, generator=generator) * large
        found = (mean + torch.randn(41, 2, width, generator=generator) * large / 3).abs()
        found[0] = 0
        return found

    own, other = states(), states()
    sample = sample_of(HiddenStateCache.from_tensors({"m": own}), "m")
    assert sample is not None
    for dtype in (torch.int8, torch.float8_e4m3fn):
        largest = 127 if dtype == torch.int8 else 448
        scales = own.abs().amax(dim=2) / largest
        scaled = own / scales.clamp_min(1e-30)[..., None]
        stored = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
        kept = HiddenStateCache.from_tensors({"m": stored}, scales={"m": scales})
        refuse_other_rows(sample, kept, "m")
    for elsewhere in (other, torch.randn(41, 2, width, generator=generator).abs()):
        elsewhere[0] = 0
        with pytest.raises(ValueError, match=r"got others in [5-8] of 8 rows"):
            refuse_other_rows(sample, HiddenStateCache.from_tensors({"m": elsewhere}), "m")


@pytest.mark.usefixtures("files")
def test_a_sample_is_small_and_checked_before_it_is_used(values: dict[str, Any], tmp_path: Path) -> None:
    run = fit({**values, "cache": imported(values, tmp_path, "own"), "epochs": 1})
    body = json.loads(run.population.read_text())
    assert set(body["sources"]) == set(NAMES) and run.population.stat().st_size < 6000
    del body["sha256"]
    sample = body["sources"]["text"]["sample"]
    for forged in (
        3,
        [],
        {**sample, "rows": sample["rows"][1:]},
        {**sample, "rows": [0, *sample["rows"][1:]]},
        {**sample, "shape": [3]},
        {**sample, "sums": ["1 2", *sample["sums"][1:]]},
        {**sample, "sums": [" ".join(["nan"] * 16), *sample["sums"][1:]]},
    ):
        forgery = {**body, "sources": {**body["sources"], "text": {"sample": forged}}}
        run.population.write_text(json.dumps(sealed(forgery)))
        with pytest.raises(ValueError, match=r"population\.json cannot be read: sources: expected a sample"):
            run.read_population()


def test_many_imported_modalities_leave_the_run_readable(values: dict[str, Any], tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(60)]
    states = {name: torch.randn(31, 1, 2) for name in names}
    for rows in states.values():
        rows[0] = 0
    write_cache(tmp_path / "many", states, item_names=HiddenStateCache.open(values["cache"]).item_names)
    run = fit({**values, "cache": str(tmp_path / "many"), "modalities": names[:2], "epochs": 1})
    assert run.read_population() is not None


@pytest.mark.usefixtures("files")
def test_appending_swapped_files_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    own = imported(values, tmp_path, "own", items=20)
    before = {file.name: file.read_bytes() for file in Path(own).iterdir()}
    with pytest.raises(ValueError, match=r"'text': source: .* has of 'image' in 20 of 20 rows that changed"):
        imported(values, tmp_path, "own", text="image", image="text")
    with pytest.raises(ValueError, match=r"'image': source: .* has of 'text' in 20 of 20 rows that changed"):
        imported(values, tmp_path, "own", image="text")
    assert {file.name: file.read_bytes() for file in Path(own).iterdir()} == before
    imported(values, tmp_path, "own")
    assert HiddenStateCache.open(own).num_items == 30
