"""The definition by hand, its gradient, and what the op refuses."""

from __future__ import annotations

import math

import pytest
import torch

from crossan_fast import ops

SLOTS = torch.tensor([[0, 1, 2], [2, 2, 1]])
IDS = torch.tensor([0, 7, 3])
POPULARITY = torch.tensor([1.0, 0.1, 0.1, 0.25, 0.1, 0.1, 0.1, 0.5])


def test_by_hand() -> None:
    embeddings = torch.tensor([[0.0, 9.0], [1.0, 2.0], [3.0, 4.0]])
    rows = ops.batch_rows(embeddings, SLOTS, IDS, POPULARITY)
    assert torch.equal(rows.columns, embeddings)
    assert rows.histories.tolist() == [[[0, 9], [1, 2]], [[3, 4], [3, 4]]]
    assert rows.by_place.tolist() == [[[0, 9], [1, 2], [3, 4]], [[3, 4], [3, 4], [1, 2]]]
    assert rows.mask.tolist() == [[False, True], [True, True]]
    assert rows.log_popularity.tolist() == pytest.approx([0, math.log(0.5), math.log(0.25)])


def test_gradcheck() -> None:
    embeddings = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rest = (SLOTS, IDS, POPULARITY.double())
    assert torch.autograd.gradcheck(lambda e: ops.batch_rows(e, *rest)[:3], (embeddings,))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embeddings", torch.zeros(3), r"embeddings: expected"),
        ("slots", torch.zeros(2, 0, dtype=torch.int64), r"slots: expected \[B, S \+ 1\]"),
        ("slots", torch.tensor([[0, 3]]), "slots: "),
        ("ids", torch.tensor([0, 1]), "ids: expected"),
        ("ids", torch.tensor([0, 8, 1]), "ids: "),
        ("popularity", POPULARITY.long(), "popularity: expected"),
        ("popularity", POPULARITY.clone().requires_grad_(), "popularity: "),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: torch.Tensor, message: str) -> None:
    arguments = {"embeddings": torch.zeros(3, 2), "slots": SLOTS, "ids": IDS, "popularity": POPULARITY}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.batch_rows(**{**arguments, name: value})
