"""The loop of docs/loops.md: run as it stands, at most 25 lines, and equal to the trainer's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast.training import TrainConfig, Trainer, evaluate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"


def script() -> str:
    section = PAGE.read_text(encoding="utf-8").split("\n## Your own loop\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_loop_is_the_trainers(
    values: dict[str, Any],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(script().splitlines()) <= 25
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "eager")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(script(), str(PAGE), "exec"), names)
    printed = capsys.readouterr().out

    config = {**values, "model": {}, "optimizer": {"learning_rate": 1e-3, "clip_norm": None}}
    trainer = Trainer(TrainConfig.from_dict({**config, "epochs": 30, "batch_size": 64}))
    trainer.fit(progress=False, say=lambda line: None)
    expected = trainer.evaluate("test")
    assert printed.strip() == str(expected)
    # AdamW's fused and unfused steps round differently.
    for name, value in names["model"].state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert evaluate(names["model"], names["cache"], names["split"]).metrics == expected.metrics
