"""SASRec by ids: what it learns, what it shares with the model, and what it is trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanModel
from crossan_fast.sasrec import SasRec, by_ids
from crossan_fast.training import Task, TrainConfig, evaluate_baselines, open_task, train_sasrec


@pytest.fixture
def task(config: TrainConfig) -> Task:
    return open_task(config)


def changed(config: TrainConfig, **model: Any) -> TrainConfig:
    return replace(config, model={**config.model, **model})


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
    assert "an epoch takes" in said[1] and len(said) == 3
    assert f"{trained.epochs} epochs" in said[2] and f"the best was epoch {trained.best_epoch}" in said[2]


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


def test_states_are_not_read(config: TrainConfig, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("read")

    for name in ("states", "scales", "gather_stored", "prefetch_stored"):
        monkeypatch.setattr(type(task.cache), name, never)
    assert train_sasrec(config, task, epochs=1).epochs == 1


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
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.3, warmup_steps=0))
    trained = train_sasrec(config, task, epochs=40, patience=3)
    assert trained.stopped_by == "patience" and trained.epochs == trained.best_epoch + 3 < 40
    reached = task.evaluate(trained.model, "validation", config.evaluation).metrics
    assert trained.validation == {"ndcg@10": reached["ndcg@10"]}
    assert "more epochs might" not in str(trained)
    short = train_sasrec(config, task, epochs=1)
    assert short.stopped_by == "epochs" and "more epochs might have done better" in str(short)
    assert short.patience == 5, "where the run has none"
    assert short.settings["learning_rate"] == 0.3 and short.settings["window"] == 5
    assert short.parameters == sum(p.numel() for p in trained.model.parameters())


def test_it_keeps_the_run_s_sequence_encoder_alone(config: TrainConfig, task: Task) -> None:
    wild = changed(
        config,
        **{"top_k": 1, "load_balance": 0.1, "id_embedding": True, "modality_dropout": 0.5},
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
    with pytest.raises(ValueError, match="folder: SasRec is not saved"):
        small.save_pretrained("anywhere")
    with pytest.raises(ValueError, match="item_ids: SASRec knows items by nothing else"):
        small.encode_items({m.name: torch.zeros(2, m.levels, m.width) for m in model.config.modalities})
