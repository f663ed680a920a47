"""Coverage, novelty and diversity against plain loops; cold targets apart; the baselines' rankings."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from crossan_fast.training import TrainConfig, Trainer, evaluate, evaluate_baselines
from crossan_fast.training.evaluation import excluded, metrics_of
from crossan_fast.training.list_metrics import coverage, diversity, list_metrics, novelty


@pytest.fixture
def trainer(config: TrainConfig) -> Trainer:
    made = Trainer(config)
    made.model.eval()
    return made


def plain(lists: Any, k: int, candidates: int, counts: Any, items: Any) -> dict[str, float]:
    """One list, one item, one pair at a time."""
    lists = [[i for i in row[:k] if i] for row in lists.tolist()]
    counts, items = counts.tolist(), items.double().numpy()
    total = sum(counts[1:])
    bits, apart = [], []
    for row in lists:
        bits.append(sum(-math.log2(max(counts[i], 1) / total) for i in row) / max(len(row), 1))
        pairs = list(combinations(row, 2))
        cosines = [
            np.dot(items[i], items[j]) / (np.linalg.norm(items[i]) * np.linalg.norm(items[j]))
            for i, j in pairs
        ]
        apart.append(sum(1 - cosine for cosine in cosines) / max(len(pairs), 1))
    return {
        f"coverage@{k}": len({i for row in lists for i in row}) / candidates,
        f"novelty@{k}": sum(bits) / len(bits),
        f"diversity@{k}": sum(apart) / len(apart),
    }


def test_lists_by_hand() -> None:
    lists = torch.tensor([[1, 2], [1, 0], [0, 0]])
    assert coverage(lists, 8) == 2 / 8
    # 16 interactions: item 1 has 8 of them (1 bit), item 2 one (4 bits); item 3 none, which counts as one.
    counts = torch.tensor([0, 8, 1, 0, 7])
    assert novelty(lists, counts) == ((1 + 4) / 2 + 1 + 0) / 3
    assert novelty(torch.tensor([[3]]), counts) == 4.0
    items = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [0.0, 0.0]])
    assert diversity(torch.tensor([[1, 2]]), items) == 1.0
    assert diversity(torch.tensor([[1, 3]]), items) == 2.0
    assert diversity(torch.tensor([[1, 2, 3]]), items) == (1 + 2 + 1) / 3
    assert diversity(torch.tensor([[1, 4]]), items) == 1.0, "an embedding of zeros is near nothing"
    assert diversity(torch.tensor([[1, 2], [2, 0]]), items) == 1 / 2, "one item has no pair"


def test_lists_equal_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    lists = torch.stack([torch.randperm(50, generator=generator)[:12] for _ in range(30)])
    lists[3, 7:] = 0
    counts = torch.randint(0, 40, (51,), generator=generator)
    counts[0] = 0
    items = torch.randn(51, 6, generator=generator)
    found = list_metrics(lists, (2, 5, 12), 50, counts, items)
    for k in (2, 5, 12):
        for name, value in plain(lists, k, 50, counts, items).items():
            assert found.pop(name) == pytest.approx(value, rel=1e-12), name
    assert not found


@pytest.mark.parametrize("rule", ["all", "all_except_target", "none"])
@pytest.mark.parametrize("some", [False, True])
def test_an_evaluation_s_lists_are_those_of_a_sort(trainer: Trainer, rule: Any, some: bool) -> None:
    task, model = trainer.task, trainer.model
    split, cache = task.split, task.cache
    chosen = torch.unique(torch.cat([split.test_target, torch.tensor([3, 5, 8])])) if some else None
    result = evaluate(
        model, cache, split, k=(3, 7), filter_history=rule, candidates=chosen, batch_size=9, lists=True
    )
    items = model.encode_catalogue(cache)
    with torch.no_grad():
        users = model.encode_users(items[split.test_input], split.test_input != 0)[:, -1]
    scores = users.double() @ items.double().T
    allowed = torch.zeros(len(items), dtype=torch.bool)
    allowed[1:] = chosen is None
    allowed[chosen if chosen is not None else slice(0, 0)] = True
    scores[:, ~allowed] = -math.inf
    banned = excluded(split.history_test, split.test_target, rule)
    if banned is not None:
        scores.scatter_(1, banned, -math.inf)
    lists = scores.argsort(dim=1, descending=True)[:, :7]
    for k in (3, 7):
        for name, value in plain(lists, k, int(allowed.sum()), split.train_counts, items).items():
            assert result.lists[name] == pytest.approx(value, rel=1e-9), name
    assert "lists" not in evaluate(model, cache, split, k=(3, 7)).to_dict()


def test_cold_targets_stand_apart(trainer: Trainer) -> None:
    task = trainer.task
    counts = task.split.train_counts.clone()
    counts[::2] = 0
    split = replace(task.split, train_counts=counts)
    result = evaluate(trainer.model, task.cache, split, k=(5,), lists=True)
    cold, warm = result.by_target["cold"], result.by_target["warm"]
    targets = split.test_target
    assert cold["targets"] == int((targets % 2 == 0).sum()) and warm["targets"] == int((targets % 2).sum())
    for name, value in result.metrics.items():
        parts = (cold["targets"] * cold[name] + warm["targets"] * warm[name]) / targets.numel()
        assert value == pytest.approx(parts, rel=1e-12), name
    assert f"cold ({cold['targets']})" in str(result)
    counts[1:] = 1
    warm_alone = evaluate(trainer.model, task.cache, replace(split, train_counts=counts), k=(5,), lists=True)
    assert warm_alone.by_target["cold"] == {"targets": 0} and "cold" not in str(warm_alone)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_baselines_are_those_of_their_definition(trainer: Trainer, part: Any) -> None:
    task, model = trainer.task, trainer.model
    split = task.split
    found = evaluate_baselines(model, task.cache, split, part, k=(1, 5), lists=True)
    items = model.encode_catalogue(task.cache).double().numpy()
    if part == "test":
        inputs, targets, history = split.test_input, split.test_target, split.history_test
    else:
        inputs, targets, history = split.validation_input, split.validation_target, split.history_validation
    scores = {"popularity": [], "last item's neighbours": []}
    for row in inputs.tolist():
        scores["popularity"].append([float(count) for count in split.train_counts])
        last = items[row[-1]]
        cosine = [np.dot(last, i) / (np.linalg.norm(last) * np.linalg.norm(i) or 1) for i in items]
        scores["last item's neighbours"].append(cosine)
    assert list(found) == list(scores)
    for name, rows in scores.items():
        ranks = []
        for own, target, seen in zip(rows, targets.tolist(), history.tolist(), strict=True):
            others = set(range(1, len(items))) - {target} - (set(seen) - {target})
            ranks.append(1 + sum(own[j] >= own[target] - 1e-9 for j in others))
        assert found[name].metrics == metrics_of(torch.tensor(ranks), (1, 5)), name
        assert found[name].protocol == evaluate(model, task.cache, split, part, k=(1, 5)).protocol
        assert found[name].lists["coverage@5"] > 0
