"""An epoch visits every row with a target once, in an order that seed and number alone decide."""

from __future__ import annotations

import pytest
import torch

from crossan_fast.training import Batches

ROWS = torch.tensor([[0, 1, 2], [0, 0, 9], [3, 4, 5], [0, 0, 0], [0, 6, 7], [8, 8, 8]])
WITH_TARGET = ROWS[[0, 2, 4, 5]]


def test_each_row_with_a_target_comes_once_and_padding_fills_up() -> None:
    extra = torch.tensor([[1, 2, 3]])
    batches = Batches(torch.cat([ROWS, extra]), 3, seed=0)
    assert (batches.rows, len(batches)) == (5, 2)
    drawn = list(batches.epoch(1))
    assert [batch.shape for batch in drawn] == [(3, 3), (3, 3)]
    joined = torch.cat(drawn)
    assert sorted(joined[:5].tolist()) == sorted([*WITH_TARGET.tolist(), *extra.tolist()])
    assert joined[5:].eq(0).all()


@pytest.mark.parametrize(("rows", "batch_size"), [(4, 3), (7, 3), (7, 2), (9, 8)])
def test_no_row_is_alone_in_the_last_batch(rows: int, batch_size: int) -> None:
    sequences = torch.arange(1, 2 * rows + 1).reshape(rows, 2)
    batches = Batches(sequences, batch_size, seed=0)
    assert len(batches) == -(-rows // batch_size)
    for number in range(1, 4):
        drawn = list(batches.epoch(number))
        held = [int(batch[:, 0].count_nonzero()) for batch in drawn]
        assert held == [batch_size] * (len(batches) - 1) + [2]
        visits = torch.cat(drawn)[:, 0].unique(return_counts=True)
        assert visits[0].tolist() == [0] * (batch_size > 2) + sequences[:, 0].tolist()
        assert visits[1][-rows:].sum() == rows + 1, "one comes twice, to keep it company"
        parts = [Batches(sequences, batch_size, seed=0, rank=rank, size=2) for rank in range(2)]
        last = torch.cat([list(part.epoch(number))[-1] for part in parts])
        assert sorted(last[last[:, 0] != 0].tolist()) == sorted(drawn[-1][drawn[-1][:, 0] != 0].tolist())


def test_a_row_that_is_the_only_one_stays_so() -> None:
    (batch,) = Batches(torch.tensor([[1, 2]]), 1, seed=0).epoch(1)
    assert batch.tolist() == [[1, 2]]


def test_seed_and_number_decide_the_order() -> None:
    rows = torch.arange(1, 201).reshape(100, 2)

    def order(seed: int, number: int) -> list[int]:
        return torch.cat(list(Batches(rows, 100, seed).epoch(number)))[:, 0].tolist()

    assert order(3, 2) == order(3, 2)
    orders = [order(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(one) for one in orders}) == 9

    batches = Batches(rows, 100, 3)
    first, again = (torch.cat(list(batches.epoch(2))) for _ in range(2))
    assert torch.equal(first, again), "an epoch does not depend on those drawn before"


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(Batches(ROWS, 2, seed=0).epoch(1))
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_sequences_are_named() -> None:
    with pytest.raises(ValueError, match="sequences: expected a row with two items or more"):
        Batches(ROWS[[1, 3]], 2, seed=0)
    with pytest.raises(ValueError, match="sequences: expected at least 2 places"):
        Batches(ROWS[:, :1], 2, seed=0)
    with pytest.raises(TypeError, match="sequences: expected dtype int64"):
        Batches(ROWS.float(), 2, seed=0)


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_has_a_row(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: expected an integer of at least 1, got {size}"):
        Batches(ROWS, size, seed=0)
