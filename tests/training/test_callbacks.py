"""Calls on the way of a training, and the two that come with the library."""

from __future__ import annotations

import ast
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import crossan_fast
from crossan_fast.training import Callback, RunFolder, TrainConfig, Trainer, WeightsAndBiases
from crossan_fast.training.callbacks import StepEnd, StepLog, TensorBoard


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.ends: list[tuple[StepEnd, float, float]] = []
        self.logs: list[list[StepLog]] = []
        self.entries: list[dict[str, Any]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.events.append("begin")

    def on_step_end(self, trainer: Trainer, step: StepEnd) -> None:
        gradients = [p.grad.double().flatten() for p in trainer.model.parameters() if p.grad is not None]
        self.ends.append((step, float(step.loss), float(torch.cat(gradients).norm())))

    def on_log(self, trainer: Trainer, steps: Any) -> None:
        self.logs.append(list(steps))

    def on_evaluate(self, trainer: Trainer, epoch: int, result: Any) -> None:
        assert result.split == "validation"
        self.events.append(f"evaluate {epoch}")

    def on_epoch_end(self, trainer: Trainer, entry: Any) -> None:
        assert json.loads(trainer.folder.log.read_text().splitlines()[-1]) == entry, "written by then"
        self.events.append(f"epoch {entry['epoch']}")
        self.entries.append(dict(entry))

    def on_train_end(self, trainer: Trainer, results: Any) -> None:
        assert trainer.folder.results.is_file()
        self.events.append("end")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self.events.append(type(error).__name__)


def config_of(values: dict[str, Any], **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**values, **changes})


def test_every_event_comes_in_its_order_with_the_numbers_of_the_steps(values: dict[str, Any]) -> None:
    # Without clipping the gradients that a step leaves have the norm that is logged.
    values["optimizer"] |= {"clip_norm": None, "warmup_steps": 4, "learning_rate": 0.01}
    recorder, trainer = Recorder(), Trainer(config_of(values, epochs=3, evaluate_every=2, log_every=2))
    trainer.fit(progress=False, callbacks=[recorder])
    assert recorder.events == ["begin", "epoch 1", "evaluate 2", "epoch 2", "evaluate 3", "epoch 3", "end"]
    steps = len(trainer.batches)
    assert steps == 5, "so that an epoch ends within an interval"
    assert [end.step for end, *_ in recorder.ends] == list(range(1, 16))
    assert [[log.step for log in logs] for logs in recorder.logs] == [
        *([1, 2], [3, 4], [5], [6], [7, 8], [9, 10], [11, 12], [13, 14], [15]),
    ]
    logged = [log for logs in recorder.logs for log in logs]
    for log, (end, loss, norm) in zip(logged, recorder.ends, strict=True):
        assert (log.epoch, log.loss, log.learning_rate) == (end.epoch, loss, end.learning_rate)
        assert log.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert log.learning_rate == pytest.approx(0.01 * min(1, log.step / 4), rel=1e-12)
    for epoch, entry in enumerate(recorder.entries, start=1):
        own = [log for log in logged if log.epoch == epoch]
        assert entry["loss"] == pytest.approx(math.fsum(log.loss for log in own) / steps, rel=1e-12)
        mean = math.fsum(log.gradient_norm for log in own) / steps
        assert entry["gradient_norm"] == pytest.approx(mean, rel=1e-12)
        assert entry["learning_rate"] == own[-1].learning_rate


def test_the_norm_is_that_before_clipping(values: dict[str, Any]) -> None:
    free, clipped = Recorder(), Recorder()
    for recorder, bound in ((free, None), (clipped, 1e-3)):
        values["optimizer"] |= {"clip_norm": bound}
        trainer = Trainer(config_of(values, epochs=1, run=f"{values['run']}-{bound}"))
        trainer.fit(progress=False, callbacks=[recorder])
    assert clipped.logs[0][0].gradient_norm == free.logs[0][0].gradient_norm > 1e-2
    assert clipped.ends[0][2] == pytest.approx(1e-3, rel=1e-3), "what the step left was clipped"


def test_callbacks_change_no_number_and_cost_no_reading_where_nobody_asks(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = Trainer._log
    monkeypatch.setattr(Trainer, "_log", lambda self, *a: (read.append(1), whole(self, *a))[1])
    plain = Trainer(config_of(values, epochs=1))
    plain.fit(progress=False, callbacks=[Callback()])
    assert not read
    watched = Trainer(config_of(values, epochs=1, run=values["run"] + "-watched"))
    watched.fit(progress=False, callbacks=[Recorder()])
    assert read
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def test_an_error_on_the_way_is_told_and_raised(values: dict[str, Any]) -> None:
    class Stopping(Recorder):
        def on_epoch_end(self, trainer: Trainer, entry: Any) -> None:
            super().on_epoch_end(trainer, entry)
            raise KeyboardInterrupt

    recorder = Stopping()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config_of(values)).fit(progress=False, callbacks=[recorder])
    assert recorder.events == ["begin", "evaluate 1", "epoch 1", "KeyboardInterrupt"]
    assert len(RunFolder(values["run"]).read_log()) == 1
    with pytest.raises(TypeError, match=r"callbacks: expected instances of Callback, got <class"):
        Trainer(config_of(values)).fit(resume=True, callbacks=[Recorder])  # type: ignore[list-item]


def test_tensorboard_events(values: dict[str, Any]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(config_of(values, epochs=1, tensorboard=True, log_every=3))
    trainer.fit(progress=False)
    trainer = Trainer(config_of(values, epochs=2, tensorboard=True, log_every=3))
    trainer.fit(progress=False, resume=True)
    events = accumulator.EventAccumulator(str(trainer.folder.tensorboard))
    events.Reload()
    losses = events.Scalars("epoch/loss")
    steps = len(trainer.batches)
    assert [event.step for event in losses] == [steps, 2 * steps]
    assert [event.value for event in losses] == pytest.approx([e["loss"] for e in trainer.history])
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [event.step for event in events.Scalars(f"step/{name}")] == list(range(1, 2 * steps + 1))
    assert len(events.Scalars("validation/ndcg@10")) == 2


def test_tensorboard_that_is_not_installed_is_named(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'crossan-fast\[tensorboard\]'"):
        TensorBoard()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Trainer(config_of(values, wandb="shop")).fit(progress=False)


class Dashboard(ModuleType):
    """Stands for the package wandb: what `init`, `log`, `summary` and `finish` were called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[SimpleNamespace] = []

    def init(self, **options: Any) -> SimpleNamespace:
        made = SimpleNamespace(id=f"id{len(self.runs)}", options=options, points=[], summary={}, ended=None)
        made.log = lambda values, step: made.points.append((step, values))
        made.finish = lambda exit_code=0: setattr(made, "ended", exit_code)
        self.runs.append(made)
        return made


def test_weights_and_biases(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    board = Dashboard()
    monkeypatch.setitem(sys.modules, "wandb", board)
    trainer = Trainer(config_of(values, epochs=1, wandb="shop", log_every=2))
    results = trainer.fit(progress=False)
    (run,) = board.runs
    assert run.options["project"] == "shop" and run.options["config"]["epochs"] == 1
    assert "resume" not in run.options and run.ended == 0
    assert [step for step, _ in run.points] == [2, 4, 5, 5], "steps only rise"
    assert set(run.points[0][1]) == {"step/loss", "step/gradient_norm", "step/learning_rate", "epoch"}
    assert run.points[-1][1]["epoch/loss"] == trainer.history[0]["loss"]
    assert run.points[-1][1]["validation/mrr"] == trainer.history[0]["validation"]["mrr"]
    assert run.summary["test/mrr"] == results["test"]["metrics"]["mrr"]

    trainer = Trainer(config_of(values, epochs=2))
    callback = WeightsAndBiases("shop", mode="offline")
    trainer.fit(progress=False, resume=True, callbacks=[callback])
    again = board.runs[1].options
    assert (again["id"], again["resume"], again["mode"]) == ("id0", "allow", "offline")
    with pytest.raises(FileExistsError):
        Trainer(config_of(values, wandb="shop")).fit(progress=False)
    assert len(board.runs) == 2, "a run that doesn't begin is not made there"


def test_lines_are_logged_and_the_library_never_prints(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="crossan_fast"):
        Trainer(config_of(values, epochs=1)).fit(progress=False)
    assert [record.name for record in caplog.records] == ["crossan_fast.training.trainer"] * 2
    assert caplog.messages[1].startswith("epoch 1/1: loss ")
    assert capsys.readouterr() == ("", "")

    package = Path(crossan_fast.__file__).parent
    for path in package.rglob("*.py"):
        if "cli" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert named not in ("print", "sys.stdout.write", "sys.stderr.write"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module != "tqdm", f"{path}:{node.lineno}: tqdm.auto shows in notebooks, too"
