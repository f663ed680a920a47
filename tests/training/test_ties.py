"""Targets with an equal among the items, and metrics in random order, against every order tried singly."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from crossan_fast.cache import HiddenStateCache
from crossan_fast.training import TrainConfig, Trainer, evaluate
from crossan_fast.training.evaluation import excluded, metrics_of
from crossan_fast.training.ranking import rank_targets
from crossan_fast.training.ties import equals_of, metrics_at_random


def twins(cache: HiddenStateCache, of: dict[int, int]) -> HiddenStateCache:
    """`cache` with the states of another in place of an item's own."""
    ids = torch.arange(cache.num_items + 1)
    for twin, original in of.items():
        ids[twin] = original
    made = HiddenStateCache.from_tensors(cache.gather(ids), cache.present[ids], list(cache.item_names))
    made.frames = cache.frames
    return made


def test_an_evaluation_tells_what_equals_cost(config: TrainConfig) -> None:
    trainer = Trainer(config)
    cache, split = trainer.task.cache, trainer.task.split
    alone = evaluate(trainer.model, cache, split, k=(5,))
    assert "equal" not in alone.note and alone.tied == 0 and alone.ties_at_random == {}
    assert not {"tied", "ties_at_random"} & alone.to_dict().keys() and "random order" not in str(alone)

    target = int(split.test_target[0])
    twin = next(item for item in range(1, cache.num_items) if item not in split.test_target.tolist())
    shared = int((split.test_target == target).sum())
    two = twins(cache, {twin: target})
    found = evaluate(trainer.model, two, split, k=(5,), filter_history="none")
    assert found.note == f"{shared} targets have an equal among their candidates"
    assert found.tied == shared and found.note in found.protocol and found.to_dict()["note"] == found.note
    assert found.to_dict()["ties_at_random"] == found.ties_at_random
    assert "all, ties in random order" in str(found)
    rest = torch.tensor([item for item in range(1, cache.num_items + 1) if item != twin])
    without = evaluate(trainer.model, two, split, k=(5,), candidates=rest, filter_history="none")
    assert without.note == "" and without.ties_at_random == {}
    # Half of the time its twin stands behind it: there the rank is the one without the twin.
    for name, value in found.ties_at_random.items():
        assert value == pytest.approx((found.metrics[name] + mixed(trainer, two, target, twin)[name]) / 2)


def mixed(trainer: Trainer, cache: HiddenStateCache, target: int, twin: int) -> dict[str, float]:
    """Metrics where `twin` is no candidate for those alone whose target is `target`."""
    split, model = trainer.task.split, trainer.model.eval()
    targets = split.test_target
    banned = torch.where(targets == target, twin, 0)[:, None]
    with torch.no_grad():
        items = model.encode_catalogue(cache)
        return metrics_of(rank_targets(model, items, split.test_input, targets, banned), (5,))


def test_a_twin_in_the_history_is_no_equal(config: TrainConfig) -> None:
    """Each target's twin is the item before it, which the filter takes off the user's candidates."""
    trainer = Trainer(config)
    cache, split = trainer.task.cache, trainer.task.split
    target = int(split.test_target[0])
    two = twins(cache, {int(split.history_test[0, -1]): target})
    shared = int((split.test_target == target).sum())
    assert evaluate(trainer.model, two, split, k=(5,), filter_history="none").tied > shared
    others = evaluate(trainer.model, two, split, k=(5,), filter_history="all")
    assert others.tied == int((split.test_target == split.history_test[0, -1]).sum())


@pytest.mark.parametrize("rule", ["none", "all", "all_except_target"])
def test_equals_are_other_candidates_of_the_same_embedding(rule: Any) -> None:
    """One user and one item at a time."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 2, (40, 3), generator=generator).double()  # 8 embeddings
    targets = torch.randint(1, 40, (200,), generator=generator)
    history = torch.randint(0, 40, (200, 12), generator=generator)
    some = torch.cat([targets.unique(), torch.tensor([0])])[:-1]
    for candidates in (None, some):
        exclude = excluded(history, targets, rule)
        found = equals_of(targets, items, candidates, exclude).tolist()
        pool = set(range(1, 40)) if candidates is None else set(candidates.tolist())
        for user, target in enumerate(targets.tolist()):
            gone = set() if exclude is None else set(exclude[user].tolist())
            same = {i for i in pool - gone - {target} if bool((items[i] == items[target]).all())}
            assert found[user] == (0 if target in gone else len(same))


def test_the_mean_over_every_order() -> None:
    """A target and its equals, permuted, behind what stands ahead of them all."""
    for ahead, equals in ((0, 0), (0, 3), (2, 3), (4, 1), (9, 2), (30, 4)):
        tried = []
        for order in permutations(range(equals + 1)):
            tried.append(metrics_of(torch.tensor([ahead + 1 + order.index(0)]), (1, 5, 10)))
        found = metrics_at_random(torch.tensor([ahead + equals + 1]), torch.tensor([equals]), (1, 5, 10))
        assert found == pytest.approx({name: sum(one[name] for one in tried) / len(tried) for name in found})
    ranks = torch.tensor([1, 7, 12, 300])
    assert metrics_at_random(ranks, torch.zeros(4, dtype=torch.int64), (5, 10)) == pytest.approx(
        metrics_of(ranks, (5, 10))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_items_that_differ_in_one_number_are_not_equal(dtype: torch.dtype) -> None:
    """Rows of -1, -0, 0 and 1 in all combinations, 0 and -0 being one number."""
    items = torch.cartesian_prod(*[torch.tensor([-1.0, -0.0, 0.0, 1.0])] * 7).to(dtype)
    items = torch.cat([torch.zeros(1, 7, dtype=dtype), items])
    targets = torch.arange(1, len(items))
    zeros = (items[1:] == 0).sum(1)
    assert torch.equal(equals_of(targets, items, None, None), 2**zeros - 1)
    distinct = 1 + (items[1:] != 0).all(1).nonzero().flatten()
    assert not equals_of(distinct, items, distinct, None).any()
    random = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not equals_of(torch.arange(1, 20_000), random, None, None).any()
