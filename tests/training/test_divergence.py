"""Training that trains nothing, or undoes itself, says so: at once where it can, else behind its epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.cli import main
from crossan_fast.training import (
    OptimizerConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    TrainingError,
    TrainStep,
    make_optimizer,
)
from crossan_fast.training.divergence import EXIT_STATUS, diverged, refuse_nothing_learned

ITEMS = 30


def fit(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    lines: list[str] = []
    results = Trainer(TrainConfig.from_dict({**values, **changes})).fit(progress=False, say=lines.append)
    return {**results, "lines": lines}


# -- batches without negatives -----------------------------------------------------------------------------


def test_a_batch_of_one_user_is_refused_before_anything_is_written(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 2 for loss 'in_batch'.*, got 1$"):
        fit(values, batch_size=1)
    assert not Path(values["run"]).exists()
    values["model"]["loss"] = "full"  # its negatives are the catalogue
    assert fit(values, batch_size=1, epochs=1)["epochs"] == 1


def test_one_user_alone_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    users = tmp_path / "one.tsv"
    users.write_text("ann\t" + " ".join(f"item{i}" for i in range(1, 8)) + "\n")
    with pytest.raises(ValueError, match=r"users: expected at least 2 for loss 'in_batch'.*, got 1 with two"):
        fit(values, users=str(users), evaluation={"candidates": "all"})


def test_users_of_one_history_are_refused_by_the_first_step(values: dict[str, Any], tmp_path: Path) -> None:
    users = tmp_path / "alike.tsv"
    history = " ".join(f"item{i}" for i in range(1, 8))
    users.write_text(f"ann\t{history}\nben\t{history}\n")
    with pytest.raises(ValueError, match="item_ids: expected items of other sequences as negatives"):
        fit(values, users=str(users), evaluation={"candidates": "all"})


@pytest.fixture
def model() -> CrossanModel:
    model = CrossanModel(
        CrossanConfig((Modality("text", 8, 2),), embedding_dim=8, bottleneck=4, window=4), backend="eager"
    )
    model.set_popularity(torch.ones(ITEMS + 1))
    return model


@pytest.fixture
def cache() -> HiddenStateCache:
    states = torch.randn(ITEMS + 1, 2, 8)
    states[0] = 0
    return HiddenStateCache.from_tensors({"text": states})


LONELY = [
    [[1, 2, 3]],
    [[0, 4, 4]],
    [[1, 2, 3], [3, 1, 2]],
    [[1, 2, 3], [0, 0, 0], [0, 0, 2]],
    [[1, 2, 1], [0, 2, 1], [2, 2, 1]],
]
IN_COMPANY = [[[1, 2, 3], [0, 0, 4]], [[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [0, 1, 2]]]


@pytest.mark.parametrize("rows", LONELY)
def test_a_batch_without_a_negative_is_an_error(
    model: CrossanModel, cache: HiddenStateCache, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"item_ids: expected items of other sequences .* got none"):
        model(torch.tensor(rows), cache=cache)
    with pytest.raises(ValueError, match="got none"):
        model(torch.tensor(rows, dtype=torch.int32), {"text": torch.zeros(len(rows), 3, 2, 8)})
    monkeypatch.setattr("crossan_fast.model.refuse_without_negatives", lambda *_: None)
    assert model(torch.tensor(rows), cache=cache).loss == 0, "what it is an error about"


@pytest.mark.parametrize("rows", IN_COMPANY)
def test_one_row_with_a_negative_is_enough(
    model: CrossanModel, cache: HiddenStateCache, rows: list[list[int]]
) -> None:
    assert model(torch.tensor(rows), cache=cache).loss > 0


def test_an_epoch_of_zeros_is_an_error_where_no_batch_was_looked_at() -> None:
    refuse_nothing_learned(torch.tensor([0.0, 1e-9]), 1)
    refuse_nothing_learned(torch.zeros(3), 2)  # learned by heart
    with pytest.raises(TrainingError, match="loss: 0 at each of the 3 steps of epoch 1"):
        refuse_nothing_learned(torch.zeros(3), 1)


# -- losses and gradients that are not finite --------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [5.0, None])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, clip_norm: float | None
) -> None:
    values["optimizer"]["clip_norm"] = clip_norm
    fit(values, epochs=1)
    whole, steps, before = TrainStep.forward_backward, [], []

    def poisoned(self: TrainStep, item_ids: Tensor, *ahead: Any) -> Tensor:
        loss = whole(self, item_ids, *ahead)
        steps.append(self)
        if len(steps) == 3:
            self._parameters[4].grad[..., 0] = math.inf
            before.extend(parameter.detach().clone() for parameter in self._parameters)
        return loss

    monkeypatch.setattr(TrainStep, "forward_backward", poisoned)
    saved = RunFolder(values["run"]).last.read_bytes()
    trainer = Trainer(TrainConfig.from_dict({**values, "epochs": 2}))
    # Of the parameters in the model's order, which is not the optimizer's, the first that is bad.
    named = r"\(gradient of [\w.]+: expected finite values, got inf at \[.*0\], in \d+ of \d+ places\)"
    with pytest.raises(TrainingError, match=rf"^gradient: inf at step 3 of epoch 2 {named}; a smaller opt"):
        trainer.fit(resume=True, progress=False, say=lambda line: None)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.step._parameters, strict=True))
    assert RunFolder(values["run"]).last.read_bytes() == saved


class Elsewhere:
    type = "cuda"


def test_on_a_gpu_the_first_bad_gradient_is_counted_without_waiting(
    model: CrossanModel, cache: HiddenStateCache
) -> None:
    settings = OptimizerConfig()
    step = TrainStep(model, cache, make_optimizer(model, settings), settings)
    step.device = Elsewhere()  # type: ignore[assignment]
    names = [name for name, _ in model.named_parameters()]
    counts = []
    for norm, bad in ((1.0, ()), (2.0, ()), (math.nan, (5, 2)), (1.0, ()), (math.inf, (0,))):
        norms = torch.full((len(names),), norm if not bad else 1.0)
        for place in bad:  # the optimizer's order is another
            parameter = model.get_parameter(names[place])
            norms[next(i for i, p in enumerate(step._parameters) if p is parameter)] = norm
        assert step._judge(torch.tensor(1.0), torch.linalg.vector_norm(norms), norms)
        counts.append(int(step.unsound))
        named = f"gradient of {names[2]}: expected finite values, got some of the norm nan"
        assert step.first_bad_gradient() == (named if counts[-1] else "")
    assert counts == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("loss_at", "gradient_at", "message"),
    [(None, 2, "gradient: nan at step 2"), (3, 2, "gradient: nan at step 2"), (2, 2, "loss: nan at step 2")],
)
def test_what_was_counted_stops_at_the_end_of_the_epoch(
    values: dict[str, Any], loss_at: int | None, gradient_at: int, message: str
) -> None:
    trainer = Trainer(TrainConfig.from_dict(values))
    steps: list[Tensor] = []

    def run(item_ids: Tensor, *ahead: Any) -> Tensor:
        steps.append(item_ids)
        trainer.step.unsound += len(steps) >= gradient_at
        trainer.step._norms[-1] = math.nan
        return torch.tensor(math.nan if loss_at is not None and len(steps) >= loss_at else 1.0)

    trainer._run = run  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=message + r" of epoch 1 \(gradient of [\w.]+: expected finite"):
        trainer.fit(progress=False, say=lambda line: None)
    assert not RunFolder(values["run"]).last.exists()


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Make the loss or a gradient of these steps, counted from 1, NaN."""
    whole, seen = TrainStep.forward_backward, []

    def poisoned(self: TrainStep, item_ids: Tensor, *ahead: Any) -> Tensor:
        loss = whole(self, item_ids, *ahead)
        seen.append(item_ids)
        if len(seen) not in steps:
            return loss
        if what == "gradient":
            self._parameters[0].grad[..., 0] = math.nan
            return loss
        return loss * math.nan

    monkeypatch.setattr(TrainStep, "forward_backward", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_steps_are_left_out_where_asked_and_counted(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    values["optimizer"]["skip_nonfinite"] = 3
    poison(monkeypatch, {2, 7}, what)  # in the epochs of 5 steps
    results = fit(values, epochs=2)
    assert results["skipped_steps"] == 2
    log = [json.loads(line) for line in RunFolder(values["run"]).log.read_text().splitlines()]
    assert [entry["skipped"] for entry in log] == [1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert "1 steps left out (not finite)" in results["lines"][1]


def test_a_step_that_is_left_out_changes_nothing(
    model: CrossanModel, cache: HiddenStateCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OptimizerConfig(skip_nonfinite=1)
    step = TrainStep(model, cache, make_optimizer(model, settings), settings)
    batch = torch.tensor(IN_COMPANY[0])
    step(batch)
    before = [t.clone() for t in (*step._parameters, *step.optimizer.state[step._parameters[0]].values())]
    poison(monkeypatch, {1, 2}, "gradient")
    step(batch)
    after = [*step._parameters, *step.optimizer.state[step._parameters[0]].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert int(step.skipped) == 1
    with pytest.raises(TrainingError, match=r"gradient: nan at step 3 \(gradient of .* got nan at"):
        step(batch)


def test_adamw_s_switch_leaves_a_step_out_on_a_gpu(model: CrossanModel, cache: HiddenStateCache) -> None:
    """The same kernels on the CPU: what `_judge` sets where the device is not waited for."""
    settings = OptimizerConfig(skip_nonfinite=1)
    step = TrainStep(model, cache, make_optimizer(model, settings), settings)
    step(torch.tensor(IN_COMPANY[0]))
    before = [p.detach().clone() for p in step._parameters]
    step.device = Elsewhere()  # type: ignore[assignment]
    for norm, moved in ((math.nan, False), (1.0, True)):
        norms = torch.full((len(step._parameters),), norm)
        assert step._judge(torch.tensor(1.0), torch.linalg.vector_norm(norms), norms)
        step.optimizer.step()
        same = all(torch.equal(*pair) for pair in zip(before, step._parameters, strict=True))
        assert same is not moved
        assert step.first_bad_gradient().startswith("gradient of ")  # of the last that was left out
    assert int(step.skipped) == 1 and int(step.unsound) == 0


def test_more_bad_steps_than_asked_for_stop_the_run(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["optimizer"]["skip_nonfinite"] = 2
    poison(monkeypatch, {2, 3, 7}, "loss")
    with pytest.raises(
        TrainingError, match=r"^loss: nan at step 2 of epoch 2; .* 2 such steps were left out"
    ):
        fit(values, epochs=2)


def test_the_bound_holds_over_a_resume(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values["optimizer"]["skip_nonfinite"] = 1
    with monkeypatch.context() as patch:
        poison(patch, {2}, "loss")
        fit(values, epochs=1)
    poison(monkeypatch, {1}, "loss")
    trainer = Trainer(TrainConfig.from_dict({**values, "epochs": 2}))
    with pytest.raises(TrainingError, match=r"^loss: nan at step 1 of epoch 2"):
        trainer.fit(resume=True, progress=False, say=lambda line: None)


@pytest.mark.parametrize("skipped", [2, 5])
def test_what_a_gpu_left_out_is_bounded_at_the_end_of_the_epoch(values: dict[str, Any], skipped: int) -> None:
    values["optimizer"]["skip_nonfinite"] = 1 if skipped == 2 else 9
    trainer = Trainer(TrainConfig.from_dict(values))

    def run(item_ids: Tensor, *ahead: Any) -> Tensor:
        bad = int(trainer.step.skipped) < skipped
        trainer.step.skipped += bad
        trainer.step._norms[0] = math.nan
        return torch.tensor(math.nan if bad else 1.0)

    trainer._run = run  # type: ignore[assignment]
    with pytest.raises(
        TrainingError,
        match=rf"^loss, gradient: not finite at {skipped} of the 5 steps of epoch 1 .* \(gradient of ",
    ):
        trainer.fit(progress=False, say=lambda line: None)


# -- losses that are finite, and worse than nothing --------------------------------------------------------


def test_a_run_that_diverged_says_so_and_its_command_fails(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["optimizer"] = {"learning_rate": 3.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml"), "epochs=1", "--quiet"]) == EXIT_STATUS == 3
    printed = capsys.readouterr()
    assert "warning: diverged: the mean loss of epoch 1 is " in printed.out
    assert printed.err.startswith("warning: diverged: the mean loss of epoch 1 is ")
    assert json.loads(RunFolder(values["run"]).results.read_text())["diverged"] is True
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "  3  trained to its end and written, but diverged" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [1e-2, 1e-9])
@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_a_run_that_learns_or_merely_stays_is_not_punished(
    values: dict[str, Any], rate: float, loss: str, recwarn: pytest.WarningsRecorder
) -> None:
    values["optimizer"] = {"learning_rate": rate}
    values["model"]["loss"] = loss
    results = fit(values)
    assert results["diverged"] is False
    assert not [line for line in results["lines"] if "warning" in line]
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_what_counts_as_diverged() -> None:
    def history(first: float, *losses: float) -> list[dict[str, float]]:
        entries = [{"epoch": number, "loss": loss} for number, loss in enumerate(losses, 1)]
        return [{**entries[0], "first_loss": first}, *entries[1:]]

    assert not diverged(history(6.0, 5.0, 7.4), 100)
    assert diverged(history(6.0, 5.0, 7.6), 100)
    assert not diverged(history(6.0, 9.0, 5.0), 100), "it came back"
    assert not diverged(history(0.1, 0.2), 100), "a first step that was lucky"
    assert diverged(history(6.0, 1.5e23), 100)
    assert not diverged([{"epoch": 1, "loss": 5.0}], 100), "a log of before"
