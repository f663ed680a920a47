"""An unknown field, key or option names the known one that was meant."""

from __future__ import annotations

import inspect

import pytest

from crossan_fast import CrossanConfig, Modality
from crossan_fast.cache import ModalitySpec
from crossan_fast.cli import main
from crossan_fast.training import TrainConfig


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: CrossanConfig(m, droput=0.1),
            r"CrossanConfig: unknown field 'droput'; did you mean 'dropout'\?",
        ),
        (lambda m: CrossanConfig(m, num_heads=2), r"'num_heads'; did you mean 'attention_heads'\?"),
        (lambda m: CrossanConfig(m, zzz=2), r"CrossanConfig: unknown field 'zzz'$"),
        (
            lambda m: Modality("a", widht=1, levels=1),
            r"Modality: unknown field 'widht'; did you mean 'width'",
        ),
        (lambda m: ModalitySpec("a", "b", pooling="cls"), r"ModalitySpec: .*'pooling'; did you mean 'pool'"),
        (lambda m: TrainConfig("c", "u", "r", epoch=3), r"TrainConfig: .*'epoch'; did you mean 'epochs'"),
    ],
)
def test_fields(call: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call([Modality("text", 8, 2)])  # type: ignore[operator]


def test_the_signature_is_the_dataclass_own() -> None:
    assert list(inspect.signature(CrossanConfig).parameters)[:2] == ["modalities", "embedding_dim"]
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'levels'"):
        Modality("a", 1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": {"lr": 1e-3}},
            r"unknown config key 'optimizer\.lr'; did you mean 'optimizer\.learning_rate'\?",
        ),
        ({"lr": 1e-3}, r"'lr'; did you mean 'optimizer\.learning_rate'"),
        ({"dropout": 0.1}, r"'dropout'; did you mean 'model\.dropout'"),
        ({"model": {"batch_size": 3}}, r"'model\.batch_size'; did you mean 'batch_size'"),
        ({"max_seq_length": 50}, r"did you mean 'model\.window'"),
        ({"optimiser": {}}, r"did you mean 'optimizer'"),
        ({"num_train_epochs": 3}, r"did you mean 'epochs'"),
    ],
)
def test_config_keys(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"cache": "c", "users": "u", "run": "r", **values})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--run", "r", "--devise", "cpu"],
            "unrecognized arguments: --devise cpu; did you mean '--device'?",
        ),
        (["cache", "build", "--items=i", "--out=o", "--modalty=a=b"], "did you mean '--modality'?"),
        (["trian", "c.yaml"], "did you mean 'train'?"),
        (["cache", "verfy", "c"], "did you mean 'verify'?"),
    ],
)
def test_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
