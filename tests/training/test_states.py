"""A model of one encoder's states reads no others of the same items and widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast import HiddenStateCache
from crossan_fast._digests import sealed
from crossan_fast.cache import convert_cache, write_cache
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer
from crossan_fast.training.states import refuse_other_specs, specs_of

TEXT = {
    "encoder": "/home/me/bert",
    "model_type": "bert",
    "kind": "text",
    "column": "title",
    "encoder_layers": 4,
    "layers": [0, 2, 4],
    "pool": "mean",
    "max_length": 30,
    "lowercase": False,
    "compute_dtype": "fp32",
    "fingerprint": "ab" * 32,
}
IMAGE = {"precomputed": "/home/me/states.npy", "layers": [0, 1, 2]}
Make = Callable[..., str]


@pytest.fixture
def make(values: dict[str, Any], tmp_path: Path) -> Make:
    """`make(folder, image=…, **text)`: the world's cache, with a record of how its states were made."""

    def make(folder: str, image: dict[str, Any] = IMAGE, seed: int = 0, **text: Any) -> str:
        cache = HiddenStateCache.open(values["cache"])
        states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
        if seed:
            states["text"][1:] = torch.randn(states["text"][1:].shape)
        source = {key: value for key, value in {**TEXT, **text}.items() if value is not None}
        names, sources = list(cache.item_names), {"text": source, "image": image}
        write_cache(tmp_path / folder, states, item_names=names, sources=sources)
        return str(tmp_path / folder)

    return make


@pytest.fixture
def settings(values: dict[str, Any], make: Make) -> dict[str, Any]:
    return {**values, "cache": make("cache"), "epochs": 1}


def fit(settings: dict[str, Any], *, resume: bool = False, **changes: Any) -> RunFolder:
    trainer = Trainer(TrainConfig.from_dict({**settings, **changes}))
    trainer.fit(progress=False, say=lambda line: None, resume=resume)
    return trainer.folder


def test_states_of_another_pooling_are_refused(
    settings: dict[str, Any], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = fit(settings), make("other", pool="cls", seed=1)
    refused = "cache: modality 'text': expected states of pool 'mean' as in the run's cache, got pool 'cls'"
    of, moved = ("--run", settings["run"]), str(tmp_path / "moved")
    for command in (
        ["evaluate", *of, "--cache", other],
        ["recommend", *of, "--cache", other, "--history", "item3"],
        ["export", settings["run"], "--cache", other, "--embeddings", str(tmp_path / "items.npy")],
        ["cache", "convert", other, "--out", str(tmp_path / "x"), "--dtype", "int8", "--no-progress", *of],
    ):
        assert main(command) == 2, command
        assert refused in capsys.readouterr().err
    Path(settings["cache"]).rename(moved)
    Path(other).rename(settings["cache"])
    pytest.importorskip("matplotlib")
    assert main(["plot", settings["run"], "--out", str(tmp_path / "plots")]) == 2
    assert refused in capsys.readouterr().err
    with pytest.raises(ValueError, match=refused):
        fit(settings, resume=True, epochs=2)
    with pytest.raises(ValueError, match=refused):
        fit(settings, init_from=str(run.path), run=str(tmp_path / "behind"))
    # Of what the model does not read it is no matter.
    fit(settings, cache=moved, modalities=["image"], run=str(tmp_path / "one"))
    fit(settings, resume=True, modalities=["image"], run=str(tmp_path / "one"), epochs=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [0, 1, 4]}, r"layers \[0, 2, 4\] .*, got layers \[0, 1, 4\]"),
        ({"model_type": "roberta"}, "model_type 'bert' .*, got model_type 'roberta'"),
        ({"fingerprint": "cd" * 32}, "an encoder with weights abababababab .* weights cdcdcdcdcdcd"),
        ({"max_length": 64}, "max_length 30 .*, got max_length 64"),
        ({"lowercase": True}, "lowercase False .*, got lowercase True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_other_states(settings: dict[str, Any], make: Make, change: Any, said: str) -> None:
    held = specs_of(HiddenStateCache.open(settings["cache"]))
    with pytest.raises(ValueError, match=f"cache: modality 'text': expected states of {said}"):
        refuse_other_specs(held, HiddenStateCache.open(make("other", **change)), ["text"])


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "owner/bert", "column": "name"},  # the same, found elsewhere
        {"compute_dtype": "bf16", "fingerprint": "cd" * 32},  # weights as they were loaded, in another dtype
        {"max_length": None, "fingerprint": None},  # an earlier version's
        {"converted_from": "bf16", "energy": [1.0, 1.0, 1.0], "note": "mine"},
        {"encoder": None, "pool": "cls", "layers": [0, 1, 2]},  # computed elsewhere
        {"image": {**IMAGE, "precomputed": "/elsewhere.npy", "layers": [3, 4, 5]}},
    ],
    ids=["place", "computed in", "unsaid", "converted", "imported", "imported again"],
)
def test_what_makes_no_other_states(
    settings: dict[str, Any], make: Make, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(settings)
    for first, second in ((settings["cache"], make("other", **change)), (make("again", **change), "")):
        held = specs_of(HiddenStateCache.open(first))
        cache = HiddenStateCache.open(second or settings["cache"])
        refuse_other_specs(held, cache, ["text", "image"])
    assert (
        main(["evaluate", "--run", settings["run"], "--cache", str(Path(settings["cache"]).parent / "other")])
        == 0
    )
    assert "not what" not in capsys.readouterr().out


def test_converted_caches_go_on(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(settings)
    for dtype in ("int8", "fp8", "fp32"):
        out = str(tmp_path / dtype)
        convert = ["cache", "convert", settings["cache"], "--out", out, "--dtype", dtype, "--no-progress"]
        assert main([*convert, "--run", settings["run"]]) == 0
        assert main(["evaluate", "--run", settings["run"], "--cache", out]) == 0
        fit(settings, resume=True, cache=out, epochs=2)
    based = ["cache", "convert", settings["cache"], "--out", str(tmp_path / "based"), "--basis", "5"]
    assert main([*based, "--centre", "text", "--no-progress", "--run", settings["run"]]) == 0
    capsys.readouterr()
    fit(settings, cache=str(tmp_path / "based"), run=str(tmp_path / "on_coordinates"))
    convert_cache(tmp_path / "based", tmp_path / "based8", "int8")
    on = ["evaluate", "--run", str(tmp_path / "on_coordinates"), "--cache", str(tmp_path / "based8")]
    assert main(on) == 0


def test_runs_of_before_it_was_kept_go_on(settings: dict[str, Any], make: Make) -> None:
    run = fit(settings)
    body = json.loads(run.population.read_text())
    assert body["sources"]["text"]["pool"] == "mean" and set(body["sources"]["image"]) == {"sample"}
    assert "/home/me" not in run.population.read_text()
    kept = {key: value for key, value in body.items() if key not in ("sources", "sha256")}
    run.population.write_text(json.dumps(sealed(kept)))
    other = make("other", pool="cls")
    assert main(["evaluate", "--run", settings["run"], "--cache", other]) == 0
    fit(settings, resume=True, cache=other, epochs=2)
    for forged in ([], {"text": 3}, "x"):
        run.population.write_text(json.dumps(sealed({**kept, "sources": forged})))
        with pytest.raises(ValueError, match=r"population\.json cannot be read: sources: expected what made"):
            run.read_population()


def test_runs_on_states_of_different_making_are_different_runs(
    settings: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    run, place = fit(settings), make("place", encoder="owner/bert")
    same = fit(settings, cache=place, run=str(tmp_path / "same"))
    other = fit(settings, cache=make("other", pool="cls"), run=str(tmp_path / "other_run"))
    assert run.run() == same.run() != other.run()
