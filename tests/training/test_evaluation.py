"""Ranks and metrics against a brute-force ranking in numpy, and against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crossan_fast.training import (
    EvaluationConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
    evaluate,
    evaluate_baselines,
    open_task,
)
from crossan_fast.training.evaluation import excluded, metrics_of
from crossan_fast.training.ranking import rank_targets


@pytest.fixture
def trainer(config: TrainConfig) -> Trainer:
    made = Trainer(config)
    made.model.eval()
    return made


def brute_force(users: Any, items: Any, targets: Any, history: Any, candidates: Any, rule: str) -> list[int]:
    """One user, one item, one comparison at a time."""
    ranks = []
    for user, target, seen in zip(users, targets, history, strict=True):
        scores = {int(j): float(np.dot(user, items[j])) for j in candidates}
        for j in scores.keys() & {int(j) for j in seen}:
            if rule == "all" or (rule == "all_except_target" and j != target):
                scores[j] = -math.inf
        ahead = sum(score >= scores[int(target)] for j, score in scores.items() if j != target)
        ranks.append(1 + ahead)
    return ranks


@pytest.mark.parametrize("rule", ["all", "all_except_target", "none"])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("some", [False, True])
def test_ranks_equal_a_brute_force_ranking(trainer: Trainer, rule: Any, part: Any, some: bool) -> None:
    split, model = trainer.task.split, trainer.model.double()
    # Half of the users get a target that repeats an item of their history.
    history, inputs = split.history_test, split.test_input
    targets = torch.where(torch.arange(len(history)) % 2 == 0, history[:, -2], split.test_target)
    if part == "validation":
        history, inputs, targets = split.history_validation, split.validation_input, split.validation_target
    candidates = torch.unique(torch.cat([targets, torch.tensor([3, 5, 8])])) if some else None
    items = model.encode_catalogue(trainer.task.cache)
    with torch.no_grad():
        users = model.encode_users(items[inputs], inputs != 0)[:, -1]
    ranks = rank_targets(
        model,
        items,
        inputs,
        targets,
        excluded(history, targets, rule),
        candidates=candidates,
        batch_size=7,
    )
    pool = range(1, len(items)) if candidates is None else candidates.tolist()
    expected = brute_force(users.numpy(), items.numpy(), targets.tolist(), history.numpy(), pool, rule)
    assert ranks.tolist() == expected


def test_a_repeated_target_is_last_under_all_and_nowhere_else(
    trainer: Trainer, sizes: SimpleNamespace
) -> None:
    split = trainer.task.split
    history = split.history_test
    targets = history[:, -1]
    items = trainer.model.encode_catalogue(trainer.task.cache)

    def ranks(rule: Any) -> torch.Tensor:
        banned = excluded(history, targets, rule)
        return rank_targets(trainer.model, items, split.test_input, targets, banned)

    assert ranks("all").eq(sizes.items).all()
    assert ranks("none").lt(sizes.items).any()
    assert (ranks("all_except_target") <= ranks("none")).all(), "fewer candidates never worsen a rank"


def test_metrics_by_hand() -> None:
    metrics = metrics_of(torch.tensor([1, 3, 7, 40]), (1, 5, 10))
    assert metrics["hr@1"] == 1 / 4
    assert metrics["hr@5"] == 2 / 4
    assert metrics["hr@10"] == 3 / 4
    assert metrics["ndcg@1"] == 1 / 4
    assert metrics["ndcg@5"] == (1 + 1 / 2) / 4, "1 / log2(3 + 1) is a half"
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4), "1 / log2(7 + 1) is a third"
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 40) / 4)
    with pytest.raises(ValueError, match="ranks: expected at least one user"):
        metrics_of(torch.tensor([], dtype=torch.int64), (10,))


def test_a_constant_scorer_gets_nothing(trainer: Trainer, sizes: SimpleNamespace) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    for rule in ("all", "none"):
        result = evaluate(
            trainer.model,
            trainer.task.cache,
            trainer.task.split,
            filter_history=rule,
            k=(10, sizes.items - 15),
        )
        for name, value in result.metrics.items():
            assert value == pytest.approx(0, abs=1 / (sizes.items - 15)) if name == "mrr" else value == 0


def test_the_protocol_is_printed(trainer: Trainer, sizes: SimpleNamespace) -> None:
    result = trainer.evaluate("test")
    assert result.protocol == (
        f"test targets of {sizes.users} users, full ranking of {sizes.items} items, "
        "filter_history=all_except_target, ties against the target"
    )
    assert result.protocol in str(result)
    assert f"{100 * result.metrics['hr@5']:8.2f}" in str(result)
    assert result.to_dict()["protocol"] == result.protocol


def test_the_mode_of_the_model_is_kept(trainer: Trainer) -> None:
    trainer.model.train()
    first, second = (trainer.evaluate("test").metrics for _ in range(2))
    assert trainer.model.training
    assert first == second, "dropout is off while ranking"


def test_wrong_arguments_are_named(trainer: Trainer, sizes: SimpleNamespace) -> None:
    model, cache, split = trainer.model, trainer.task.cache, trainer.task.split
    with pytest.raises(ValueError, match=r"part: expected one of .*got 'tset'; did you mean 'test'"):
        evaluate(model, cache, split, "tset")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"filter_history: expected one of .*did you mean 'none'"):
        evaluate(model, cache, split, filter_history="nonee")  # type: ignore[arg-type]
    for k in (0, sizes.items):
        with pytest.raises(ValueError, match=f"k: expected 1 to {sizes.items - 1}, .* got {k}"):
            evaluate(model, cache, split, k=(k,))
    lacking = split.test_target.unique()[1:]
    wrong = int(split.test_target.unique()[0])
    with pytest.raises(ValueError, match=f"candidates: expected every target among them, item {wrong} is"):
        evaluate(model, cache, split, candidates=lacking, k=(1,))


def test_embeddings_that_are_not_finite_are_an_error(config: TrainConfig) -> None:
    trainer = Trainer(config)
    with torch.no_grad():
        trainer.model.sequence_encoder.norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match="model: the embedding of user 0 is not finite"):
        trainer.evaluate("test")
    with torch.no_grad():
        trainer.model.heads["text"].bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"model: the embedding of item 'item1' \(row 1\) is not finite"):
        trainer.evaluate("test")


def test_a_task_evaluates_by_a_protocol(config: TrainConfig) -> None:
    trainer = Trainer(config)
    task = trainer.task
    protocol = replace(config.evaluation, filter_history="none", candidates="all", batch_size=7)
    result = task.evaluate(trainer.model, "validation", protocol, k=(3,))
    alike = evaluate(trainer.model, task.cache, task.split, "validation", k=(3,), filter_history="none")
    assert result == alike and result.metrics.keys() == {"hr@3", "ndcg@3", "mrr"}
    used = task.evaluate(trainer.model, "test", config.evaluation)
    assert used.candidates == task.used.numel() and f"hr@{config.evaluation.k[-1]}" in used.metrics


def test_a_task_reports_what_it_holds(config: TrainConfig, sizes: SimpleNamespace) -> None:
    task = open_task(config)
    assert task.candidates(config.evaluation) is task.used
    assert f"{sizes.users} users, {sizes.items} items" in task.describe()


def test_candidates_are_distinct_rows(trainer: Trainer, sizes: SimpleNamespace) -> None:
    """One that stands twice counted twice, padding and rows from the end counted as items."""
    model, cache, split = trainer.model, trainer.task.cache, trainer.task.split
    rows = torch.arange(1, sizes.items + 1)
    for wrong, message in (
        (rows.repeat(2), f"candidates: expected each row once, got {sizes.items} more than once, such as 1$"),
        (torch.cat([rows, torch.tensor([0])]), rf"candidates: expected rows 1 to {sizes.items} .*, got 0$"),
        (torch.cat([rows, torch.tensor([-1])]), rf"candidates: expected rows 1 to {sizes.items} .*, got -1$"),
    ):
        for judge in (evaluate, evaluate_baselines):
            with pytest.raises(ValueError, match=message):
                judge(model, cache, split, candidates=wrong)
    with pytest.raises(TypeError, match=r"candidates: expected a tensor \[\?\], got list"):
        evaluate(model, cache, split, candidates=rows.tolist())  # type: ignore[arg-type]
    shuffled = evaluate(model, cache, split, candidates=rows.flip(0))
    assert shuffled.metrics == evaluate(model, cache, split, candidates=rows).metrics


def test_batches_of_users_and_cutoffs_are_integers(trainer: Trainer) -> None:
    """With a batch of -5 users nobody was ranked, and every rank was 0: HR 100 %."""
    model, cache, split = trainer.model, trainer.task.cache, trainer.task.split
    for size in (-5, 0):
        with pytest.raises(ValueError, match=f"batch_size: expected an integer of at least 1, got {size}"):
            evaluate(model, cache, split, batch_size=size)
        with pytest.raises(ValueError, match=f"batch_size: expected an integer of at least 1, got {size}"):
            model.encode_catalogue(cache, batch_size=size)
    with pytest.raises(TypeError, match=r"k: expected an integer or a list of integers, got 2\.5"):
        evaluate(model, cache, split, k=(2.5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: expected at least one cut-off, got none"):
        evaluate(model, cache, split, k=(), lists=True)
    with pytest.raises(TypeError, match="split: expected a Split, as leave_one_out gives, got dict"):
        evaluate(model, cache, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cache: expected a HiddenStateCache, .* got 'cache'"):
        evaluate(model, "cache", split)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=f"ids: expected rows 0 to {cache.num_items}, got 999"):
        model.encode_catalogue(cache, ids=torch.tensor([999]))


@pytest.mark.parametrize("one", [7, np.int64(7), np.array(7)])
def test_one_cutoff_is_a_list_of_one(trainer: Trainer, one: Any) -> None:
    task, protocol = trainer.task, EvaluationConfig(k=one)
    where = trainer.model, task.cache, task.split
    assert evaluate(*where, k=one) == evaluate(*where, k=(7,))
    assert evaluate_baselines(*where, k=one) == evaluate_baselines(*where, k=[7])
    assert task.evaluate(trainer.model, "test", protocol, k=one).metrics.keys() == {"hr@7", "ndcg@7", "mrr"}
    assert protocol.k == (7, 10) and {type(k) for k in protocol.k} == {int}


@pytest.mark.parametrize("wrong", ["10", None, 2.5, True, ["5"], [True], torch.tensor([1, 2]), np.array(5.0)])
def test_what_is_no_cutoff_is_named(trainer: Trainer, wrong: Any) -> None:
    expected = "k: expected an integer or a list of integers, got "
    with pytest.raises(TypeError, match=f"^evaluation.{expected}"):
        EvaluationConfig(k=wrong)
    where = trainer.model, trainer.task.cache, trainer.task.split
    with pytest.raises(TypeError, match=f"^{expected}"):
        evaluate(*where, k=wrong)
    with pytest.raises(TypeError, match=f"^{expected}"):
        evaluate_baselines(*where, k=wrong)


def test_one_beta_is_named() -> None:
    for wrong in (0.9, (0.9,)):
        with pytest.raises(ValueError, match=r"optimizer\.betas: expected two numbers in \[0, 1\), got "):
            OptimizerConfig(betas=wrong)  # type: ignore[arg-type]
