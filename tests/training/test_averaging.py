"""The moving average against its recurrence in float64, and what a run does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from crossan_fast.training import TrainConfig, Trainer
from crossan_fast.training.averaging import WeightAverage


def test_the_recurrence_by_hand() -> None:
    model = nn.Linear(3, 2).double()
    average = WeightAverage(model, decay=0.6)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
            torch.testing.assert_close(average.tensors()[name], expected[name])


def test_applied_lends_the_average_and_gives_the_weights_back() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, decay=0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    own = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), average.applied():
        assert torch.equal(model.weight, before)
        raise KeyboardInterrupt
    assert torch.equal(model.weight, own)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    average = WeightAverage(nn.Linear(3, 2), decay=0.5)
    with pytest.raises(ValueError, match="expected an average of every parameter"):
        average.load_tensors({"weight": torch.zeros(2, 3)})


def test_the_best_model_is_the_average_and_training_does_not_notice(
    values: dict[str, Any], tmp_path: Any
) -> None:
    def trained(run: str, **optimizer: Any) -> Trainer:
        changed = {**values, "run": str(tmp_path / run), "epochs": 1}
        changed["optimizer"] = {**values["optimizer"], **optimizer}
        trainer = Trainer(TrainConfig.from_dict(changed))
        trainer.fit(progress=False, say=lambda line: None)
        return trainer

    plain, averaged = trained("plain"), trained("averaged", average=0.9)
    weights = {run: run.folder.load_model("last").state_dict() for run in (plain, averaged)}
    for name, value in weights[plain].items():
        assert torch.equal(value, weights[averaged][name]), name
    assert averaged.step.average is not None
    best = averaged.folder.load_model("best").state_dict()
    for name, value in averaged.step.average.tensors().items():
        assert torch.equal(best[name], value), name
        if value.abs().sum() > 0:
            assert not torch.equal(best[name], weights[averaged][name]), name
    with torch.no_grad():
        assert averaged.history[0]["validation"] == averaged.evaluate("validation").metrics


def test_a_table_that_is_given_other_memory_is_averaged_on():
    model = nn.Linear(3, 2, bias=False)
    average = WeightAverage(model, decay=0.5)
    model.weight.data = torch.full((2, 3), 4.0)
    for step in range(40):
        average.update(step)
    torch.testing.assert_close(average.tensors()["weight"], torch.full((2, 3), 4.0))
    with average.applied():
        assert torch.equal(model.weight, average.tensors()["weight"])
