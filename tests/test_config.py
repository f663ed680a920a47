"""CrossanConfig: what it accepts, refuses and gives back."""

from __future__ import annotations

import pytest

from crossan_fast import CrossanConfig, Modality

TEXT, IMAGE = Modality("text", 768, 7), Modality("image", 1024, 7)


@pytest.mark.parametrize(
    "config",
    [
        CrossanConfig([TEXT, IMAGE]),
        CrossanConfig([TEXT, IMAGE], cross_projection="low_rank"),
        CrossanConfig([TEXT], cross="side", top_k=1, load_balance=0.01, dropout=0.2, loss="full"),
        CrossanConfig.iisan([IMAGE, TEXT], bottleneck=16),
    ],
)
def test_json_gives_the_same_config_back(config):
    assert CrossanConfig.from_json(config.to_json()) == config


def test_iisan_is_one_class_with_other_values():
    config = CrossanConfig.iisan([IMAGE, TEXT])
    assert (config.head, config.fusion, config.activation, config.cross) == ("two", "concat", "relu", "none")
    assert [t.name for t in config.towers] == ["image", "text", "image+text"]
    assert [t.width for t in config.towers] == [1024, 768, 768]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        *(
            (
                {"modalities": [TEXT], name: value},
                ValueError,
                rf"{name}: expected a finite number, got {value}",
            )
            for name in ("load_balance", "gate_temperature", "adapter_std", "dropout", "modality_dropout")
            for value in (float("inf"), float("nan"))
        ),
        ({"modalities": []}, ValueError, r"modalities: expected at least one"),
        ({"modalities": "text"}, TypeError, r"modalities: expected a sequence of Modality, got str"),
        ({"modalities": [TEXT, TEXT]}, ValueError, r"names must be distinct, \['text'\]"),
        (
            {"modalities": [TEXT, Modality("a", 8, 5)]},
            ValueError,
            r"same number of levels.*'text': 7, 'a': 5",
        ),
        ({"modalities": [{"name": "a", "width": 8}]}, ValueError, r"modality: missing \['levels'\]"),
        (
            {"modalities": [{"name": "a", "widht": 8, "levels": 7}]},
            ValueError,
            r"unknown modality key 'widht'; did you mean 'width'",
        ),
        ({"embeding_dim": 8}, ValueError, r"unknown config key 'embeding_dim'; did you mean 'embedding_dim'"),
        ({"embedding_dim": 0}, ValueError, r"embedding_dim: expected at least 1, got 0"),
        ({"expert_expansion": 2**63}, ValueError, r"expert_expansion: expected less than 2\^31, got 92"),
        ({"bottleneck": 64.0}, TypeError, r"bottleneck: expected an integer, got 64.0"),
        ({"cross": "all"}, ValueError, r"cross: expected one of \['backbone', 'side', 'none'\], got 'all'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": "high"}, TypeError, r"dropout: expected a number, got 'high'"),
        ({"gate_temperature": 0}, ValueError, r"gate_temperature: expected a positive number"),
        (
            {"attention_heads": 3},
            ValueError,
            r"attention_heads: expected a divisor of embedding_dim=64, got 3",
        ),
        ({"top_k": 2}, ValueError, r"top_k: expected at most the number of modalities, 1, got 2"),
        ({"load_balance": -1}, ValueError, r"load_balance: expected a weight of at least 0"),
        ({"deduplicate": 1}, TypeError, r"deduplicate: expected true or false"),
        ({"fusion": "concat", "top_k": 1}, ValueError, r"top_k and load_balance belong to fusion='momef'"),
        (
            {"cross": "none", "cross_projection": "low_rank"},
            ValueError,
            r"cross_projection: cross='none' has no cross terms to project, expected 'identity'",
        ),
        ({"architecture": "iisan"}, ValueError, r"architecture='iisan' has no cross terms"),
        ({"architecture": "iisan", "cross": "none"}, ValueError, r"fuses by 'concat', got 'momef'"),
    ],
)
def test_bad_values_are_named(values, error, message):
    with pytest.raises(error, match=message):
        CrossanConfig.from_dict({"modalities": [TEXT], **values})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a.b", 8, 7), ValueError, r"Modality.name: expected letters"),
        (("a", 0, 7), ValueError, r"Modality.width: expected at least 1, got 0"),
        (("a", 8, True), TypeError, r"Modality.levels: expected an integer, got True"),
    ],
)
def test_bad_modalities_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Modality(*arguments)


def test_config_must_be_an_object():
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        CrossanConfig.from_json("[]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 60_000, "config: expected JSON of a few levels"),
        (" " * 70_000, "config: expected at most 65536 bytes in the JSON text"),
        ("{", "config: expected JSON, got"),
        (
            '{"modalities": [{"name": "a", "width": 1, "levels": 1}], "dropout": 1' + "0" * 400 + "}",
            "dropout: ",
        ),
    ],
)
def test_json_of_someone_else_is_read_within_bounds(text, message):
    with pytest.raises(ValueError, match=message):
        CrossanConfig.from_json(text)
