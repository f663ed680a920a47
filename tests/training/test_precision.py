"""What a run computes in: bf16 where a GPU multiplies it, fp32 elsewhere, and what it began with."""

from __future__ import annotations

import csv
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast.training import RunFolder, TrainConfig, Trainer, train
from crossan_fast.training import precision as precision_module
from crossan_fast.training.precision import choose_precision, computing_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A GPU that is not here: `multiplies` tells whether bf16 has matrix units there."""
    pretended = types.SimpleNamespace(multiplies=True)

    def supported(including_emulation: bool) -> bool:
        return bool(pretended.multiplies or including_emulation)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    return pretended


@pytest.mark.parametrize(
    ("multiplies", "device", "name", "reason"),
    [
        (True, CUDA, "bf16", "autocast; a card has matrix units for it"),
        (False, CUDA, "fp32", "a card has no matrix units for bf16"),
        (
            True,
            CPU,
            "fp32",
            "of CPUs those alone that multiply it are faster in bf16, a step by a sixth at most, with the "
            "full softmax by a quarter to a third, see benchmarks/results/",
        ),
        (True, torch.device("mps"), "fp32", "mps has no matrix units for bf16"),
    ],
)
def test_auto_follows_the_device(
    card: types.SimpleNamespace, multiplies: bool, device: torch.device, name: str, reason: str
) -> None:
    card.multiplies = multiplies
    assert str(choose_precision("auto", device)) == f"{name} ({reason})"


def test_a_run_keeps_what_it_began_with(card: types.SimpleNamespace) -> None:
    assert choose_precision("auto", CUDA, "fp32").name == "fp32"
    kept = choose_precision("auto", CPU, "bf16")
    assert (kept.name, kept.reason) == ("bf16", "as the run began")
    assert choose_precision("fp32", CUDA, "bf16").name == "fp32", "what refuses it compares the configs"


def test_tf32_is_refused_where_there_is_none(card: types.SimpleNamespace) -> None:
    assert str(choose_precision("tf32", CUDA)) == "tf32 (asked for)"
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16 here, got 'tf32': cpu has no"):
        choose_precision("tf32", CPU)
    card.multiplies = False
    with pytest.raises(ValueError, match="got 'tf32': a card has no matrix units"):
        choose_precision("auto", CUDA, "tf32")


def test_the_switch_is_turned_for_the_step_alone(matmul_switch: Any) -> None:
    """Whatever it was before, also where the step fails."""
    for before in ("none", "ieee", "tf32"):
        matmul_switch.fp32_precision = before
        with computing_in("fp32"):
            assert matmul_switch.fp32_precision == before
        with pytest.raises(KeyError), computing_in("tf32"):
            assert matmul_switch.fp32_precision == "tf32"
            assert before == "tf32" or matmul_switch.allow_tf32, "torch's older switch says the same"
            raise KeyError
        assert matmul_switch.fp32_precision == before


def test_a_tf32_step_computes_under_the_switch(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, matmul_switch: Any
) -> None:
    """Forward and backward do; an evaluation doesn't."""
    monkeypatch.setattr(precision_module, "_no_matrix_units", lambda device: None)
    trainer = Trainer(TrainConfig.from_dict({**values, "precision": "tf32", "epochs": 1}))
    seen: dict[bool, list[str]] = {True: [], False: []}
    trainer.model.sequence_encoder.register_forward_hook(
        lambda *rest: seen[trainer.model.training].append(matmul_switch.fp32_precision)
    )
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda grad: seen[True].append(matmul_switch.fp32_precision))
    trainer.fit(progress=False, say=lambda line: None)
    assert set(seen[True]) == {"tf32"} and len(seen[True]) == 2 * len(trainer.batches)
    assert seen[False] and "tf32" not in seen[False]


def test_the_first_line_the_config_and_the_results_say_it(values: dict[str, Any]) -> None:
    lines: list[str] = []
    trainer = Trainer(TrainConfig.from_dict({**values, "epochs": 1}))
    trainer.fit(progress=False, say=lines.append)
    assert lines[0] == f"precision: fp32 ({trainer.precision.reason})"
    folder = RunFolder(values["run"])
    assert folder.read_config().precision == "fp32"
    said = json.loads(folder.results.read_text())["precision"]
    assert said == {"name": "fp32", "reason": trainer.precision.reason}


def test_a_resumed_run_computes_as_it_began(values: dict[str, Any]) -> None:
    """Whether the config says nothing or the same; another is refused."""
    train(TrainConfig.from_dict({**values, "epochs": 1, "precision": "bf16"}), progress=False)
    for epochs, stated in ((2, {}), (3, {"precision": "bf16"})):
        config = TrainConfig.from_dict({**values, "epochs": epochs, **stated})
        results = train(config, resume=True, progress=False)
        assert results["precision"]["name"] == "bf16"
        assert RunFolder(values["run"]).read_config().precision == "bf16"
    changed = TrainConfig.from_dict({**values, "epochs": 4, "precision": "fp32"})
    with pytest.raises(ValueError, match=r"precision: the run was made with 'bf16', .* got 'fp32'"):
        train(changed, resume=True, progress=False)


@pytest.mark.parametrize("again", [{}, {"precision": "fp32"}])
def test_a_resumed_runs_results_give_the_reason_that_it_began_by(
    values: dict[str, Any], again: dict[str, Any]
) -> None:
    began = train(TrainConfig.from_dict({**values, "epochs": 1}), progress=False)
    for epochs in (2, 3):
        config = TrainConfig.from_dict({**values, **again, "epochs": epochs})
        assert train(config, resume=True, progress=False)["precision"] == began["precision"]


def test_no_cpu_measured_gains_much_in_bf16_but_for_some_steps() -> None:
    """Which is why fp32 is the CPU's default: our steps and epochs, of each case the least of its rows, as a
    machine's pace changes between runs; where the CPU doesn't multiply bf16 no gain that a repeated run would
    not take back, else a sixth at most. docs/training.md names what gains more."""
    measured = 0
    for path in RESULTS.glob("*cores*.csv"):
        amx = "amx" in path.name
        multiplies = amx or (path.name.startswith("amd") and "avx512" in path.name)
        found: dict[tuple[str, str], float] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                case, time = row["case"], float(row["p50_ms"])
                pays = (multiplies and "loss=full" in case) or (amx and "architecture=iisan" in case)
                if case.startswith(("step/", "epoch/")) and row["backend"] == "cpp" and not pays:
                    found[case, row["dtype"]] = min(time, found.get((case, row["dtype"]), time))
        pairs = [(time, found[case, "fp32"]) for (case, kind), time in found.items() if kind == "bf16"]
        least = 0.82 if multiplies else 0.9
        assert all(bf16 > least * fp32 for bf16, fp32 in pairs), path.name
        measured += bool(pairs)
    assert measured >= 3
