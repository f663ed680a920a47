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
        ({"user_column": "x"}, r"'user_column'; did you mean 'columns\.user'\?"),
        ({"item_column": "x"}, r"'item_column'; did you mean 'columns\.item'\?"),
        ({"rating_col": "x"}, r"did you mean 'columns\.rating'"),
        ({"USER_ID_FIELD": "x"}, r"'USER_ID_FIELD'; did you mean 'columns\.user'"),
        ({"timestamp_field": "x"}, r"did you mean 'columns\.time'"),
        ({"title_column": "x"}, r"did you mean 'item_columns\.title'"),
        ({"item_columsn": {}}, r"did you mean 'item_columns'"),
        ({"colums": {}}, r"did you mean 'columns'"),
        ({"columns": {"usr": "x"}}, r"^columns: .*'usr'; did you mean 'user'"),
        ({"item_columns": {"titel": "x"}}, r"^item_columns: .*'titel'; did you mean 'title'"),
        ({"dropuot": 0.1}, r"'dropuot'; did you mean 'model\.dropout'"),
        ({"filter_histroy": "none"}, r"did you mean 'evaluation\.filter_history'"),
        ({"model": {"learning_rat": 1}}, r"did you mean 'optimizer\.learning_rate'"),
        ({"zzz": 1}, r"unknown config key 'zzz'$"),
        ({"fields": {}}, r"unknown config key 'fields'$"),
        ({"image_column": "x"}, r"unknown config key 'image_column'$"),
        ({"file_col": "x"}, r"unknown config key 'file_col'$"),
        ({"time": "x"}, r"'time'; did you mean 'columns\.time'\?"),
        ({"title": "x"}, r"'title'; did you mean 'item_columns\.title'\?"),
        ({"user": "x"}, r"'user'; did you mean 'users'"),
        ({"item": "x"}, r"'item'; did you mean 'items'"),
        ({"batch": 3}, r"'batch'; did you mean 'batch_size'"),
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
