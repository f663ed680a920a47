"""What every backend says alike about arguments: gradients that it gives none, counts, types, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_ops import needs_cpp

from crossan_fast import ops

BACKENDS = ["eager", pytest.param("cpp", marks=needs_cpp)]
EVERY = pytest.mark.parametrize("backend", BACKENDS)


def batch(**changes: Any) -> dict[str, Any]:
    return {
        "users": torch.randn(2, 3, 4),
        "items": torch.randn(6, 4),
        "slots": torch.tensor([[0, 1, 2, 3], [0, 0, 4, 5]]),
        "counts": torch.tensor([0, 1, 1, 1, 1, 2]),
        "log_popularity": -torch.rand(6),
        **changes,
    }


@EVERY
def test_what_gets_no_gradient_must_not_need_one(backend: str) -> None:
    wanting = batch(log_popularity=torch.zeros(6, requires_grad=True))
    with pytest.raises(ValueError, match=r"log_popularity: expected a tensor that needs no gradient"):
        ops.in_batch_loss(**wanting, backend=backend)
    with torch.no_grad():
        assert ops.in_batch_loss(**wanting, backend=backend).isfinite()


@EVERY
def test_scales_get_no_gradient(backend: str) -> None:
    structure = ops.SideNetworkStructure((3,), ((0,),))
    shapes = [(2, 5, 3), (2, 5), (2, 3, 5), (2, 3), (2,), (4, 3), (4,)]
    weights = ops.SideNetworkWeights(*([torch.randn(*shape)] for shape in shapes))
    states = [torch.zeros(6, 2, 3, dtype=torch.int8)]
    scales = [torch.ones(6, 2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"scales\[0\]: expected a tensor that needs no gradient"):
        ops.side_network(states, weights, structure, scales=scales, backend=backend)


@EVERY
def test_negative_counts_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"counts: expected integers of at least 0, got -3"):
        ops.in_batch_loss(**batch(counts=torch.tensor([0, 1, -3, 1, 1, 2])), backend=backend)
    weights = fusion_weights(torch.float32)
    with pytest.raises(ValueError, match=r"counts: expected integers of at least 0, got -1"):
        ops.fusion(torch.randn(3, 2, 4), weights, counts=torch.tensor([1, -1, 2]), backend=backend)


def fusion_weights(dtype: torch.dtype) -> ops.FusionWeights:
    shapes = [(2, 8), (2,), (2, 5, 4), (2, 5), (2, 4, 5), (2, 4)]
    return ops.FusionWeights(*(torch.randn(*shape).to(dtype) for shape in shapes))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_balance_has_one_type_and_counts_more_than_a_half_type_can(
    backend: str, dtype: torch.dtype
) -> None:
    weights, embeddings = fusion_weights(dtype), torch.randn(3, 2, 4).to(dtype)
    counts = torch.tensor([70_000, 1, 70_000])  # fp16 ends at 65,504
    balance = ops.fusion(embeddings, weights, counts=counts, backend=backend).balance
    assert balance.dtype == torch.promote_types(dtype, torch.float32)
    exact = ops.FusionWeights(*(w.double() for w in weights))
    expected = ops.fusion_reference(embeddings.double(), exact, counts=counts).balance
    torch.testing.assert_close(balance.double(), expected, rtol=0.05, atol=0)


@EVERY
def test_the_balance_has_its_type_under_autocast(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.fusion(torch.randn(3, 2, 4), fusion_weights(torch.float32), backend=backend)
    assert (output.items.dtype, output.balance.dtype) == (torch.bfloat16, torch.float32)


@EVERY
def test_a_catalogue_of_padding_alone_is_refused(backend: str) -> None:
    users, items = torch.randn(2, 4), torch.randn(1, 4)
    with pytest.raises(ValueError, match="items: expected a padding row and at least one item"):
        ops.full_loss(users, items, torch.zeros(2, dtype=torch.int64), backend=backend)


@EVERY
@pytest.mark.parametrize("k", [7, 2**31, 2**70])
def test_more_best_items_than_there_are_cost_nothing(backend: str, k: int) -> None:
    users, items = torch.randn(3, 4), torch.randn(6, 4)
    top = ops.topk_scores(users, items, k, backend=backend)
    assert top.ids.shape == top.scores.shape == (3, 5)
    assert (top.ids.sort(dim=1).values == torch.arange(1, 6)).all()


@EVERY
def test_ids_out_of_range_are_named(backend: str) -> None:
    users, items = torch.randn(2, 4), torch.randn(6, 4)
    for bad in (-1, 6, 2**40):
        with pytest.raises(ValueError, match=rf"targets: expected integers from \d to 5, got {bad}"):
            ops.full_loss(users, items, torch.tensor([1, bad]), backend=backend)
        with pytest.raises(ValueError, match=rf"targets: expected integers from 1 to 5, got {bad}"):
            ops.rank_of_target(users, items, torch.tensor([1, bad]), backend=backend)
        with pytest.raises(ValueError, match=rf"slots: expected integers from 0 to 5, got {bad}"):
            ops.in_batch_loss(**batch(slots=torch.tensor([[0, 1, 2, bad], [0, 0, 4, 5]])), backend=backend)
