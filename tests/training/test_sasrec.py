"""SASRec by ids: what it learns, what it shares with the model, and what it is trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanModel, Modality, _sources
from crossan_fast.sasrec import SasRec, by_ids
from crossan_fast.training import Task, TrainConfig, evaluate_baselines, open_task, train_sasrec
from crossan_fast.training.step import TrainingError, TrainStep
from crossan_fast.training.train_config import SplitConfig


@pytest.fixture
def task(config: TrainConfig) -> Task:
    return open_task(config)


def changed(config: TrainConfig, **model: Any) -> TrainConfig:
    return replace(config, model={**config.model, **model})


@pytest.mark.sweep(1)
@pytest.mark.parametrize("model", [{}, {"loss": "full"}, {"scores": "cosine", "temperature": 0.1}])
def test_it_learns_who_follows_whom(config: TrainConfig, model: dict[str, Any]) -> None:
    """Item i follows item i - 1, from the ids alone: popularity and random states know nothing of it."""
    config = changed(config, dropout=0.0, **model)
    task, said = open_task(config), []
    trained = train_sasrec(config, task, epochs=60, patience=20, say=said.append)
    states = CrossanModel(config.crossan_config(task.cache), backend="eager")
    states.set_popularity(task.split)
    found = task.evaluate_baselines(
        states, "test", config.evaluation, names=("sasrec", "popularity"), sasrec=trained.model, k=(1,)
    )
    assert list(found) == ["SASRec by ids", "popularity"]
    assert found["SASRec by ids"].metrics["hr@1"] > 0.95
    assert found["popularity"].metrics["hr@1"] < 0.2
    assert found["SASRec by ids"].protocol == found["popularity"].protocol
    assert "at most 60 epochs" in said[0] and "seed 0" in said[0], "said before it begins"
    assert "an epoch takes" in said[1] and len(said) == 6, "of two trainings"
    assert "learning_rate 0.01," in said[0] and "learning_rate 0.00333333," in said[3]
    ended = said[2 + 3 * list(trained.tried).index(trained.settings["learning_rate"])]
    assert f"{trained.epochs} epochs" in ended and f"the best was epoch {trained.best_epoch}" in ended


def test_the_learning_rate_is_chosen_on_validation(config: TrainConfig, task: Task) -> None:
    rates = (1e-6, 1e-2, 3e-3)
    each = [train_sasrec(config, task, epochs=8, learning_rates=[rate]) for rate in rates]
    reached = [one.validation["ndcg@10"] for one in each]
    chosen = train_sasrec(config, task, epochs=8, learning_rates=rates)
    assert chosen.tried == dict(zip(rates, reached, strict=True)) and len(set(reached)) > 1
    best = each[reached.index(max(reached))]
    assert max(reached) > reached[0], "a rate of nothing learns nothing"
    assert chosen.settings == best.settings and chosen.validation == best.validation
    for name, value in best.model.state_dict().items():
        assert torch.equal(chosen.model.state_dict()[name], value), name
    assert f"; with learning_rate 1e-06 {100 * reached[0]:.2f} %" in str(chosen)
    assert "id_weight_decay 5.0" in str(chosen)
    own = train_sasrec(config, task, epochs=1)
    assert list(own.tried) == [0.01, 0.01 / 3]
    assert list(train_sasrec(config, task, epochs=1, learning_rates=rates[0]).tried) == [rates[0]]
    with pytest.raises(ValueError, match="learning_rates: expected at least one, got none"):
        train_sasrec(config, task, learning_rates=[])
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: expected a positive number, got 0"):
        train_sasrec(config, task, learning_rates=[0.0])


@pytest.mark.parametrize(
    "wrong", ["0.1", True, ["0.1"], [0.1, None], torch.tensor(0.1), np.array("a"), [[0.1]]], ids=str
)
def test_what_is_no_learning_rate_is_named(config: TrainConfig, task: Task, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^learning_rates: expected a number or a list of numbers, got "):
        train_sasrec(config, task, learning_rates=wrong)


def test_a_learning_rate_may_be_numpys(config: TrainConfig, task: Task) -> None:
    for rates in (np.float32(0.125), np.array([0.125])):
        assert list(train_sasrec(config, task, epochs=1, learning_rates=rates).tried) == [0.125]  # type: ignore[arg-type]


def test_a_learning_rate_that_diverges_is_left_out(
    config: TrainConfig, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrainStep.__call__

    def failing(self: TrainStep, *batch: Any) -> torch.Tensor:
        loss = whole(self, *batch)
        return loss * torch.nan if self.optimizer.param_groups[0]["base_lr"] > 0.1 else loss

    monkeypatch.setattr(TrainStep, "__call__", failing)
    config = replace(config, optimizer=replace(config.optimizer, id_weight_decay=0.0))
    for rates in ([0.2, 0.01], [0.01, 0.2]):
        said: list[str] = []
        trained = train_sasrec(config, task, epochs=1, learning_rates=rates, say=said.append)
        assert trained.settings["learning_rate"] == 0.01 and list(trained.tried) == rates
        assert trained.tried[0.2] is None and trained.tried[0.01] is not None
        assert "; with learning_rate 0.2 it failed" in str(trained)
        assert any("loss nan" in line and "left out" in line for line in said)
    with pytest.raises(TrainingError, match="loss nan"):
        train_sasrec(config, task, epochs=1, learning_rates=[0.3, 0.2])


def test_a_learning_rate_that_decays_ids_to_nothing_is_left_out(config: TrainConfig, task: Task) -> None:
    """By default it is 5 a unit of learning rate: a run over states alone may well have trained with 0.3."""
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.3, id_weight_decay=5.0))
    said: list[str] = []
    trained = train_sasrec(config, task, epochs=1, say=said.append)
    assert trained.tried[0.3] is None and trained.settings["learning_rate"] == 0.3 / 3
    assert any("id_weight_decay: expected below 1 / learning rate" in line for line in said)
    with pytest.raises(
        ValueError, match=r"optimizer\.id_weight_decay: expected below 1 / learning rate = 1, "
    ):
        train_sasrec(config, task, epochs=1, learning_rates=[3.0, 1.0])


def test_the_loss_is_that_of_its_definition(config: TrainConfig) -> None:
    """Full softmax over all items' vectors, in float64, one place at a time."""
    config = changed(config, loss="full", dropout=0.0)
    task = open_task(config)
    model = SasRec(by_ids(config.crossan_config(task.cache)), task.cache.num_items, "eager").double()
    ids = task.split.train[:7]
    out = model(ids, cache=task.cache)
    vectors = model.items.weight
    users = model.encode_users(vectors[ids[:, :-1]], ids[:, :-1] != 0)
    losses = [
        -F.log_softmax(vectors[1:] @ users[row, place], dim=0)[int(ids[row, place + 1]) - 1]
        for row in range(len(ids))
        for place in range(ids.shape[1] - 1)
        if ids[row, place]
    ]
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    out.loss.backward()
    assert vectors.grad is not None and bool((vectors.grad[1:] != 0).all()) and not vectors.grad[0].any()


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize(
    "model", [{}, {"loss": "full"}, {"loss": "full", "deduplicate": False}, {"loss": "sampled"}]
)
def test_states_are_not_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], by_id: bool
) -> None:
    """By any loss, nor where the catalogue is encoded; also as on a GPU that the cache is not resident on."""
    config = changed(config, **model)
    task = open_task(config)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("read")

    for name in ("states", "scales", "gather", "gather_stored", "prefetch", "prefetch_stored", "to"):
        monkeypatch.setattr(type(task.cache), name, never)
    monkeypatch.setattr(_sources, "read_by_id", lambda cache, device: by_id)
    trained = train_sasrec(config, task, epochs=1)
    assert trained.epochs == 1
    encoded = trained.model.encode_catalogue(task.cache, batch_size=7)
    assert torch.equal(encoded[1:], trained.model.items.weight.detach()[1:]) and not encoded[0].any()


def test_settings_say_what_holds(config: TrainConfig) -> None:
    plain = train_sasrec(config, open_task(config), epochs=1).settings
    assert plain["targets"] == "all" and plain["warmup_steps"] == 3 and plain["precision"] == "fp32"
    for name in ("negatives", "stride", "temperature", "label_smoothing", "average", "clip_norm"):
        assert name not in plain, f"{name} is as by default, or says nothing"
    model = {"loss": "sampled", "targets": "last", "negatives": 50, "negative_sampling": "popularity"}
    model |= {"label_smoothing": 0.1, "scores": "cosine", "temperature": 0.2}
    optimizer = replace(config.optimizer, average=0.9, clip_norm=None, warmup_steps=0)
    config = replace(changed(config, **model), optimizer=optimizer, split=SplitConfig(stride="prefixes"))
    config = replace(config, precision="bf16", max_items=None)
    trained = train_sasrec(config, open_task(config), epochs=1)
    wanted = {**model, "stride": "prefixes", "average": 0.9, "clip_norm": None, "precision": "bf16"}
    assert {name: trained.settings.get(name, "none") for name in wanted} == wanted
    assert "warmup_steps" not in trained.settings
    assert "targets last, negatives 50, negative_sampling popularity" in str(trained)


def test_a_cache_that_grew_names_what_it_lacks(config: TrainConfig, task: Task) -> None:
    small = SasRec(by_ids(config.crossan_config(task.cache)), task.cache.num_items - 2)
    lacks = r"cache: SasRec has vectors for items 1 to 28, got item 30"
    with pytest.raises(ValueError, match=lacks):
        small.encode_catalogue(task.cache)
    known = torch.tensor([28, 3])
    assert torch.equal(small.encode_catalogue(task.cache, ids=known), small.items.weight.detach()[known])
    small.set_popularity(task.split)
    with pytest.raises(ValueError, match=lacks):
        small(task.split.train[:7], cache=task.cache)


def test_a_seed_is_a_result_and_leaves_torch_s_generator(config: TrainConfig, task: Task) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (train_sasrec(config, task, epochs=2).model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = train_sasrec(config, task, epochs=2, seed=1).model.state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(first["items.weight"], other["items.weight"])


def test_it_stops_and_gives_the_best_epoch(config: TrainConfig, task: Task) -> None:
    # So large a rate spoils what the first epochs found.
    optimizer = replace(config.optimizer, learning_rate=0.3, warmup_steps=0, id_weight_decay=0.0)
    config = replace(config, optimizer=optimizer)
    trained = train_sasrec(config, task, epochs=40, patience=3, learning_rates=[0.3])
    assert trained.stopped_by == "patience" and trained.epochs == trained.best_epoch + 3 < 40
    reached = task.evaluate(trained.model, "validation", config.evaluation).metrics
    assert trained.validation == {"ndcg@10": reached["ndcg@10"]}
    assert "more epochs might" not in str(trained)
    short = train_sasrec(config, task, epochs=1, learning_rates=[0.3])
    assert short.stopped_by == "epochs" and "more epochs might have done better" in str(short)
    assert short.patience == 5, "where the run has none"
    assert short.settings["learning_rate"] == 0.3 and short.settings["window"] == 5
    assert short.parameters == sum(p.numel() for p in trained.model.parameters())


def test_it_keeps_the_run_s_sequence_encoder_alone(config: TrainConfig, task: Task) -> None:
    wild = changed(
        config,
        **{
            "top_k": 1,
            "load_balance": 0.1,
            "id_embedding": True,
            "id_fusion": "sum",
            "modality_dropout": 0.5,
        },
        **{"modality_dropout_scope": "history", "cross_projection": "low_rank", "label_smoothing": 0.1},
    )
    made = by_ids(wild.crossan_config(task.cache))
    assert made == replace(by_ids(config.crossan_config(task.cache)), label_smoothing=0.1)
    assert made.window == 5 and made.blocks == 1 and made.fusion == "concat" and not made.id_embedding
    assert train_sasrec(wild, task, epochs=1).model.config == made


def test_wrong_wishes_are_refused(config: TrainConfig, task: Task) -> None:
    with pytest.raises(ValueError, match="epochs: expected an integer of at least 1, got 0"):
        train_sasrec(config, task, epochs=0)
    model = CrossanModel(config.crossan_config(task.cache))
    model.set_popularity(task.split)
    with pytest.raises(ValueError, match=r"names: .*'sasrek'; did you mean 'sasrec'"):
        evaluate_baselines(model, task.cache, task.split, names=["sasrek"])
    with pytest.raises(ValueError, match="sasrec: expected the model of train_sasrec"):
        evaluate_baselines(model, task.cache, task.split, names=["sasrec"])
    small = SasRec(by_ids(model.config), task.cache.num_items)
    with pytest.raises(ValueError, match=r"sasrec: goes with 'sasrec' among names, got \['popularity'\]"):
        evaluate_baselines(model, task.cache, task.split, names=["popularity"], sasrec=small)
    for message, call in (
        ("folder: SasRec is not saved", lambda: small.save_pretrained("anywhere")),
        ("repo_id: SasRec is not saved", lambda: small.push_to_hub("any/where")),
        ("folder: SasRec is not loaded", lambda: SasRec.from_pretrained("anywhere")),
        ("state_dict: SasRec has no place", lambda: SasRec.from_iisan({})),
        ("modality: SasRec has no towers", lambda: small.extend(Modality("audio", 4, 3))),
        ("name: SasRec has no towers .*'text'", lambda: small.remove("text")),
        ("items: SasRec has no gates", lambda: small.explain(None, task.cache)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="item_ids: SASRec knows items by nothing else"):
        small.encode_items({m.name: torch.zeros(2, m.levels, m.width) for m in model.config.modalities})
