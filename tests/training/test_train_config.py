"""Files, overrides, and the message of every wrong value."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from crossan_fast import CrossanConfig
from crossan_fast.cache import HiddenStateCache
from crossan_fast.training import EvaluationConfig, OptimizerConfig, TrainConfig, load_config
from crossan_fast.training.overrides import apply_overrides
from crossan_fast.training.train_config import SplitConfig


def test_a_file_with_overrides(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    overrides = ["model.dropout=0.3", "optimizer.learning_rate=1e-4", "patience=null", "evaluation.k=[3, 7]"]
    config = load_config(file, [*overrides, "modalities=text", "optimizer.betas=[0.8, 0.9]"])
    assert config.model["dropout"] == 0.3
    assert config.model["embedding_dim"] == 16, "a nested override leaves its neighbours"
    assert config.optimizer.learning_rate == 1e-4, "YAML reads 1e-4 as text"
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.evaluation.k == (3, 7, 10)
    assert config.modalities == ("text",)
    assert config.patience is None
    assert TrainConfig.from_dict(config.to_dict()) == config
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "unknown config key 'epoch'; did you mean 'epochs'?"),
        ("optimizer.learnig_rate=1", "'optimizer.learnig_rate'; did you mean 'optimizer.learning_rate'?"),
        ("model.dropuot=0", "unknown config key 'model.dropuot'; did you mean 'model.dropout'?"),
        ("model.modalities=[]", "unknown config key 'model.modalities'"),
        ("epochs=many", "epochs: expected an integer, got 'many'"),
        ("epochs=true", "epochs: expected an integer, got True"),
        (
            "batch_size=9999999999999999999",
            "batch_size: expected an integer of 64 bits, got 9999999999999999999",
        ),
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("seed=-1", "seed: expected 0 to 2"),
        ("strict=1", "strict: expected true or false, got 1"),
        ("cache=7", "cache: expected text, got 7"),
        ("cache=null", "expected cache to be set"),
        ("min_items=2", "min_items: expected at least 3"),
        ("max_items=2", "max_items: expected at least 3"),
        ("patience=0", "patience: expected at least 1 or null, got 0"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected a number, got 'fast'"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: expected a positive number, got 0.0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: expected at least 0 and finite, got -1.0"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay: expected at least 0 and finite, got inf"),
        (
            "optimizer.id_weight_decay=-1",
            "optimizer.id_weight_decay: expected at least 0 and finite, or null, got -1.0",
        ),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: expected a positive number, got inf"),
        ("optimizer.clip_norm=.inf", "optimizer.clip_norm: expected a positive number or null, got inf"),
        ("optimizer.fusion=.nan", "optimizer.fusion: expected at least 0 and finite, got nan"),
        ("optimizer.skip_nonfinite=-1", "optimizer.skip_nonfinite: expected at least 0 and finite, got -1"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected 2 values, got [0.9]"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: expected two numbers in [0, 1), got (0.9, 1.0)"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm: expected a positive number or null, got 0.0"),
        ("optimizer.average=1", "optimizer.average: expected a number in (0, 1) or null, got 1.0"),
        ("optimizer=adam", "optimizer: expected fields, got 'adam'"),
        ("model=big", "model: expected fields, got 'big'"),
        ("evaluation.k=[0]", "evaluation.k: expected integers of at least 1, got (0,)"),
        ("precision=fp8", "precision: expected one of ['auto', 'fp32', 'tf32', 'bf16'], got 'fp8'"),
        (
            "evaluation.filter_history=al",
            "evaluation.filter_history: expected one of ['all', 'all_except_target', 'none'], got 'al'; "
            "did you mean 'all'?",
        ),
        ("model.dropout.p=1", "'dropout' in 'model.dropout.p=1' has no fields"),
        ("epochs", "override: expected key=value, got 'epochs'"),
        ("k=[1", "override: the value of 'k=[1' is no YAML"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        TrainConfig.from_dict(apply_overrides(values, [override]))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate="fast"), "optimizer.learning_rate: expected a number, got 'f"),
        (lambda: OptimizerConfig(warmup_steps=1.5), "optimizer.warmup_steps: expected an integer, got 1.5"),
        (lambda: EvaluationConfig(candidates="usd"), "evaluation.candidates: expected one of .*'used'"),
        (lambda: EvaluationConfig(filter_history="al"), "evaluation.filter_history: expected one of"),
        (lambda: EvaluationConfig(batch_size="9"), "evaluation.batch_size: expected an integer, got '9'"),
        (lambda: SplitConfig(by="tim"), "split.by: expected one of .*; did you mean 'time'"),
        (lambda: TrainConfig("c", "u", "r", epochs="3"), "^epochs: expected an integer, got '3'"),
        (lambda: TrainConfig("c", "u", "r", min_items="5"), "^min_items: expected an integer, got '5'"),
    ],
)
def test_a_wrong_value_is_named_where_python_makes_the_config(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_numbers_of_numpy_are_plain_ones_in_a_config() -> None:
    optimizer = OptimizerConfig(learning_rate=np.float32(0.5), warmup_steps=np.int64(3))
    config = TrainConfig("c", "u", "r", optimizer=optimizer, epochs=np.int64(2))
    text = yaml.safe_dump(config.to_dict())
    assert TrainConfig.from_dict(yaml.safe_load(text)) == config
    assert (config.epochs, optimizer.warmup_steps, optimizer.learning_rate) == (2, 3, 0.5)


def test_another_architecture_brings_its_defaults_to_a_resolved_config(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """A run's config.yaml has every field, and would keep CROSSAN's activation and head in IISAN's towers."""
    file = tmp_path / "config.yaml"

    def model_of(held: dict[str, Any], *overrides: str) -> dict[str, Any]:
        file.write_text(yaml.safe_dump(TrainConfig.from_dict({**values, "model": held}).to_dict()))
        return dict(load_config(file, overrides).model)

    iisan = {**CrossanConfig.defaults({"architecture": "iisan"}), "dropout": 0.3}
    assert model_of({"dropout": 0.3}, "model.architecture=iisan") == iisan
    assert model_of(iisan, "model.architecture=crossan") == {**CrossanConfig.defaults({}), "dropout": 0.3}
    # What the file or an override says beyond defaults stays, and so does all where nothing changes.
    assert model_of({"activation": "relu", "head": "two"}, "model.architecture=iisan")["head"] == "two"
    named = model_of({}, "model.architecture=iisan", "model.head=one", "model.activation=gelu")
    assert named == {**iisan, "dropout": 0.1, "head": "one", "activation": "gelu"}
    assert model_of(iisan, "model.dropout=0.2") == {**iisan, "dropout": 0.2}


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config: no file .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    file = tmp_path / "config.yaml"
    for content, message in [
        (b"[1, 2]", "expected a mapping"),
        (b"a: [", "is no YAML"),
        (b"cache: \xff", "is not UTF-8"),
        (b"cache: c", "expected users, run to be set"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_config(file)


# Nine lines that stand for 10^9 values: their repr, in the message for a wrong value, would take hours.
BOMB = "\n".join(["a0: &a0 boom", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cache: &a c\nusers: *a\nrun: r\n", r"aliases .*line 2, column 8"),
        (
            "cache: c\nmodel: {dropout: 0.2}\nmodel: {window: 20}\n",
            r"the key 'model' is there twice .*line 3, column 1",
        ),
        ("model: {window: 20, dropout: 0.2, window: 10}", "the key 'window' is there twice"),
        ("modalities: " + "[" * 5000, "nested more than 32 deep"),
        ("- " * 5000, "nested more than 32 deep"),
        ("cache: " + "c" * 100_000, "expected at most 65536 bytes in .*config.yaml"),
        ("epochs: 2001-13-01", "is no YAML: month must be in 1..12"),
        ("epochs: " + ":".join(["1"] * 500) + ".5", "without a colon .* got 1:1:"),
        ("epochs: !!int ''", "is no YAML: "),
        ("strict: !!bool maybe", "is no YAML: "),
    ],
    ids=[
        *("alias", "a key twice", "a nested key twice", "deep flow", "deep block", "large", "date", "float"),
        *("no digit", "no truth"),
    ],
)
def test_a_file_of_someone_else_is_read_within_bounds(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_config(file)
    assert str(raised.value).startswith("config: ")


@pytest.mark.parametrize("number", ["010", "-010", "0_10", "00", "01.5", "1:30", "1:30.5", "-1:00:00"])
def test_a_number_that_yaml_reads_otherwise_than_it_looks_is_refused(
    values: dict[str, Any], tmp_path: Path, number: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"override: .*without a leading zero.*, got {number}; .* is text"):
        load_config(file, [f"seed={number}"])
    file.write_text(yaml.safe_dump(values) + f"evaluation:\n  k: [5, {number}]\n")
    with pytest.raises(ValueError, match=f"config: .*got {number};.*line "):
        load_config(file)


def test_other_numbers_and_text_of_digits_are_read(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    config = load_config(file, ["seed=1_000", "epochs=0x10", "optimizer.weight_decay=0.5", "device='010'"])
    assert (config.seed, config.epochs, config.optimizer.weight_decay) == (1000, 16, 0.5)
    assert config.device == "010"
    moments = "{by: time, validation: 2020-03-11 10:30:00, test: '09:30'}"
    assert load_config(file, [f"split={moments}"]).split.test == "09:30"


def test_a_yaml_bomb_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{BOMB}\ncache: *a9\nusers: u\nrun: r\n")
    # In a process of its own: what expands a bomb does so inside one call that nothing interrupts.
    script = "import sys; from crossan_fast.training import load_config; load_config(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=120
    )
    assert "ValueError: config: " in done.stderr
    assert "aliases (*name) are not read here" in done.stderr


def test_an_override_and_a_number_are_bounded_too(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"override: the value of .* aliases"):
        apply_overrides(values, ["modalities=[&a x, *a]"])
    with pytest.raises(TypeError, match=r"model\.dropout: expected a number"):
        TrainConfig.from_dict(apply_overrides(values, [f"model.dropout={10**400}"]))


def test_the_data_folder_is_a_setting_or_a_variable(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["users"] = "${data}/users.tsv"
    monkeypatch.delenv("CROSSAN_FAST_DATA", raising=False)
    with pytest.raises(ValueError, match=r"users: .* needs the setting data=FOLDER or .* CROSSAN_FAST_DATA"):
        TrainConfig.from_dict(values).path("users")
    monkeypatch.setenv("CROSSAN_FAST_DATA", "/from/variable")
    assert TrainConfig.from_dict(values).path("users") == Path("/from/variable/users.tsv")
    assert TrainConfig.from_dict({**values, "data": "/set"}).path("users") == Path("/set/users.tsv")
    with pytest.raises(ValueError, match="items: expected a path"):
        TrainConfig.from_dict({**values, "items": None}).path("items")


def test_the_model_takes_the_modalities_asked_for(values: dict[str, Any], world: Path) -> None:
    cache = HiddenStateCache.open(world / "cache")
    config = TrainConfig.from_dict({**values, "modalities": ["image", "text"]})
    assert config.crossan_config(cache).modality_names == ("image", "text")
    with pytest.raises(ValueError, match=r"modalities: the cache holds .*got 'imag'; did you mean 'image'"):
        TrainConfig.from_dict({**values, "modalities": ["imag"]}).crossan_config(cache)
    iisan = TrainConfig.from_dict({**values, "model": {"architecture": "iisan"}}).crossan_config(cache)
    assert (iisan.fusion, iisan.head, iisan.activation) == ("concat", "two", "relu")


def test_configs_of_one_model_are_equal(values: dict[str, Any]) -> None:
    plain = TrainConfig.from_dict(values)
    stated = TrainConfig.from_dict(apply_overrides(values, ["model.attention_heads=2", "model.top_k=null"]))
    assert stated == plain
    assert plain.to_dict()["model"]["cross"] == "backbone", "a resolved config leaves nothing to a default"
    iisan = TrainConfig.from_dict({**values, "model": {"architecture": "iisan"}})
    assert iisan == TrainConfig.from_dict({**values, "model": {"architecture": "iisan", "head": "two"}})
    assert iisan != TrainConfig.from_dict({**values, "model": {"architecture": "iisan", "head": "one"}})


@pytest.mark.parametrize(("text", "expected"), [("off", "off"), ("open", "open"), ("'lazy'", "lazy")])
def test_when_to_compare_checksums(values: dict[str, Any], tmp_path: Path, text: str, expected: str) -> None:
    """A bare `off` is false to YAML."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values) + f"verify: {text}\n")
    assert load_config(file).verify == load_config(file, [f"verify={text}"]).verify == expected
    assert TrainConfig.from_dict(values).verify == "lazy"
    with pytest.raises(ValueError, match=r"verify: expected one of .* got True"):
        load_config(file, ["verify=on"])
