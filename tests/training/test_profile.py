"""`train --profile` names every part of a step, writes a trace, and leaves no run behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossan_fast.cli import main
from crossan_fast.training import TrainConfig, Trainer
from crossan_fast.training.profile import PARTS, profile_steps


def test_parts_add_up_and_the_trace_names_them(values: dict[str, Any]) -> None:
    trainer = Trainer(TrainConfig.from_dict(values))
    found = profile_steps(trainer, 7)  # more than an epoch of 5
    assert trainer.step.steps == 5 + 7 + 7
    assert list(found.parts) == [*PARTS, "other"]
    assert all(share > 0 for name, share in found.parts.items() if name != "other")
    assert sum(found.parts.values()) == pytest.approx(1, abs=0.01)
    assert 0 < found.floor < found.step
    events = json.loads(found.trace.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    for part in PARTS:
        assert names.count(f"crossan_fast.{part}") >= 7, part


def test_the_command_prints_it_and_trains_nothing(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "--profile", "2"]) == 0
    printed = capsys.readouterr().out
    assert "sequence_encoder" in printed
    assert "% of it" in printed
    assert [entry.name for entry in Path(values["run"]).iterdir()] == ["profile"]
    assert main(["train", str(path), "--profile", "0"]) == 2
    assert "profile: expected at least 1 step, got 0" in capsys.readouterr().err
