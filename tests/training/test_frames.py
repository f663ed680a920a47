"""A model of states in one basis, or centred, reads no others, whatever reads them to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast import HiddenStateCache
from crossan_fast.cache import convert_cache, write_cache
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer


@pytest.fixture
def settings(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run on coordinates in 3 dimensions."""
    wide = HiddenStateCache.open(values["cache"])
    convert_cache(values["cache"], tmp_path / "cache", basis=3)
    # The same items and widths; a basis of other states, as of a cache that has grown since.
    states = {m.name: torch.randn_like(s) for m, s in zip(wide.modalities, wide.states("cpu"), strict=True)}
    for state in states.values():
        state[0] = 0
    write_cache(tmp_path / "turned", states, item_names=list(wide.item_names))
    convert_cache(tmp_path / "turned", tmp_path / "other", basis=3)
    return {**values, "cache": str(tmp_path / "cache"), "run": str(tmp_path / "run"), "epochs": 1}


def test_another_basis_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(TrainConfig.from_dict(settings))
    trainer.fit(progress=False)
    assert {m.width for m in trainer.model.config.modalities} == {3}
    held = RunFolder(settings["run"]).read_population()
    names = trainer.model.config.modality_names
    assert held is not None and set(held.bases) == set(names)
    convert = ("cache", "convert", settings["cache"], "--dtype", "int8", "--no-progress")
    assert main([*convert, "--out", str(tmp_path / "int8"), "--run", settings["run"]]) == 0
    assert "test: HR@10" in capsys.readouterr().out
    assert main(["evaluate", "--run", settings["run"], "--cache", str(tmp_path / "int8")]) == 0
    own = held.bases[names[0]][:12]
    refused = (
        f"cache: modality {names[0]!r}: expected states in basis or centring {own} as in the run's "
        "cache, got states in basis"
    )
    history = list(trainer.task.cache.item_names[1:3])
    other, run = str(tmp_path / "other"), ("--run", settings["run"])
    for command in (
        ["evaluate", *run, "--cache", other],
        ["recommend", *run, "--cache", other, "--history", *history],
        ["cache", "convert", other, "--out", str(tmp_path / "x"), "--dtype", "int8", "--no-progress", *run],
    ):
        assert main(command) == 2, command
        assert refused in capsys.readouterr().err
    Path(settings["cache"]).rename(tmp_path / "moved")
    Path(other).rename(settings["cache"])
    with pytest.raises(ValueError, match=refused):
        Trainer(TrainConfig.from_dict({**settings, "epochs": 2})).fit(resume=True, progress=False)
    held.require_states(HiddenStateCache.open(tmp_path / "moved"), names)


def test_a_run_on_centred_states(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line: convert, train, and what refuses states that are not centred."""
    whole, out = values["cache"], str(tmp_path / "z")
    assert main(["cache", "convert", whole, "--out", out, "--centre", "--no-progress"]) == 0
    said = capsys.readouterr().out
    names = [m.name for m in HiddenStateCache.open(whole).modalities]
    assert all(f"{name}: centred" in said for name in names)
    assert main(["cache", "info", out]) == 0
    assert "(centred)" in capsys.readouterr().out
    settings = {**values, "cache": out, "run": str(tmp_path / "run"), "epochs": 1}
    Trainer(TrainConfig.from_dict(settings)).fit(progress=False)
    held = RunFolder(settings["run"]).read_population()
    assert held is not None and set(held.bases) == set(names)
    assert main(["evaluate", "--run", settings["run"]]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", settings["run"], "--cache", whole]) == 2
    message = capsys.readouterr().err
    assert (
        "expected states in basis or centring" in message and "states as their encoder gave them" in message
    )
    # And the other way round, with what centring costs a model of the states as they were: nothing.
    raw = {**values, "run": str(tmp_path / "raw"), "epochs": 1}
    Trainer(TrainConfig.from_dict(raw)).fit(progress=False)
    again = ["cache", "convert", whole, "--out", str(tmp_path / "y"), "--center", names[0], "--no-progress"]
    assert main([*again, "--run", raw["run"]]) == 0
    said = capsys.readouterr().out
    assert f"{names[0]}: centred" in said and f"{names[1]}: centred" not in said
    assert said.count("(+0.00% relative)") == 2
