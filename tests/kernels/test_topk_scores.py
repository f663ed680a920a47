"""The top-k kernel against the plain reference, on scores that floating point holds exactly."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from scoring import best_by_hand, no_numbers
from triton.runtime import interpreter

from crossan_fast.kernels import topk_scores
from crossan_fast.ops.topk_scores import topk_scores_reference

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _fast_exclusive_or(monkeypatch):
    """Sorting exchanges by exclusive or, which the interpreter reduces element by element in Python."""
    slowly = interpreter.ReduceOps.generic_reduce

    def reduce(self, values):
        if self.combine_fn is not tl.standard._xor_combine:
            return slowly(self, values)
        data = np.bitwise_xor.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, values[0].dtype)]

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)


def kernel(users, items, k, exclude):
    excluded = None if exclude is None else exclude.to(DEVICE)
    return [out.cpu() for out in topk_scores.forward(users.to(DEVICE), items.to(DEVICE), k, excluded)]


def make(batch, width, items, history, dtype, seed=0):
    """Small integers: exact in every type, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(-3, 4, (batch, width), generator=generator).to(dtype)
    embeddings = torch.randint(-3, 4, (items + 1, width), generator=generator).to(dtype)
    exclude = torch.randint(0, items + 1, (batch, history), generator=generator)
    return users, embeddings, exclude


def assert_same(users, items, k, exclude):
    scores, ids = kernel(users, items, k, exclude)
    expected = topk_scores_reference(users, items, k, exclude)
    assert scores.dtype == users.dtype and ids.dtype == torch.int64
    assert torch.equal(scores, expected.scores)
    assert torch.equal(ids, expected.ids)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 10, 17])
def test_matches_the_reference_exactly(k, dtype):
    users, items, exclude = make(21, 7, 301, 5, dtype)
    assert_same(users, items, k, exclude)


def test_two_hundred_of_a_catalogue_of_several_tiles():
    users, items, exclude = make(3, 16, 700, 9, torch.float32)
    assert_same(users, items, 200, exclude)


def test_fewer_candidates_than_k():
    users, items, _ = make(5, 4, 6, 1, torch.float32)
    exclude = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0], [6, 6, 6, 6, 6, 6], [1] * 6, [3] * 6])
    assert_same(users, items, 6, exclude)
    _, ids = kernel(users, items, 6, exclude)
    assert not ids[0].any(), "nothing is left to recommend"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products_that_round(dtype):
    # Scores of random vectors: a different order of summation may exchange near ties, so scores are judged.
    generator = torch.Generator().manual_seed(1)
    users, items = (torch.randn(n, 24, generator=generator).to(dtype) for n in (18, 400))
    scores, ids = kernel(users, items, 12, None)
    truth = users.double() @ items.double().T
    truth[:, 0] = float("-inf")
    tolerance = 4 * torch.finfo(dtype).eps * truth[:, 1:].abs().max()
    assert (scores.double() - truth.gather(1, ids)).abs().max() <= tolerance
    assert (truth.topk(12).values - scores.double()).abs().max() <= tolerance
    assert all(len(set(row)) == 12 for row in ids.tolist())


def test_a_score_that_is_no_number_is_never_recommended():
    users, items = torch.ones(2, 3), torch.ones(40, 3)
    items[5] = float("nan")
    items[6] = float("inf")
    items[7] = float("-inf")
    scores, ids = kernel(users, items, 38, None)
    assert ids[0].tolist() == [6, *(i for i in range(1, 40) if i not in (5, 6, 7)), 0]
    assert scores[0, 0] == float("inf") and scores[0, -1] == float("-inf")


@pytest.mark.parametrize("k", [1, 10, 120])
def test_users_and_items_with_no_numbers(k):
    users, items, exclude, _ = no_numbers()
    scores, ids = kernel(users, items, k, exclude)
    assert ids.tolist() == best_by_hand(users, items, k, exclude)
    assert not scores.isnan().any() and (scores[:2] == float("-inf")).all()


def test_negative_zero_ties_with_zero():
    items = torch.tensor([[9.0], [0.0], [-0.0], [0.0], [-1.0], [1.0]])
    _, ids = kernel(torch.ones(1, 1), items, 5, None)
    assert ids.tolist() == [[5, 1, 2, 3, 4]]


def test_scores_of_every_sign_and_size_keep_their_order():
    values = torch.tensor([0.0, 1e-42, 3.0, -1e-42, -2.5, 1e38, -1e38, 1e-38, -0.0, 7.0])
    items = torch.cat([torch.zeros(1), values])[:, None]
    scores, _ = kernel(torch.ones(1, 1), items, 10, None)
    assert torch.equal(scores[0], values.sort(descending=True).values + 0.0)


def test_no_users_and_strided_inputs():
    users, items, exclude = make(11, 6, 90, 4, torch.float32)
    scores, ids = kernel(users[:0], items, 3, exclude[:0])
    assert scores.shape == ids.shape == (0, 3)
    assert_same(users.T.contiguous().T, torch.cat([items, items], 1)[:, :6], 3, exclude.T.contiguous().T)


def test_registered_op_passes_opcheck():
    users, items, exclude = (t.to(DEVICE) for t in make(3, 4, 20, 2, torch.float32))
    torch.library.opcheck(torch.ops.crossan_fast.topk_scores.default, (users, items, 5, exclude, "triton"))


@pytest.mark.parametrize(("items", "k"), [(700, 513), (70_000, 66_000)])
def test_lists_longer_than_a_tile(items, k):
    """No tile of Triton's holds so many: by a sort of numpy's, ties by the lower id."""
    users, embeddings, exclude = make(2, 4, items, 5, torch.float32)
    scores, ids = kernel(users, embeddings, k, exclude)
    for user, own, found_scores, found in zip(users, exclude, scores, ids, strict=True):
        wanted = (embeddings @ user).double().numpy()
        wanted[[0, *own.tolist()]] = -np.inf
        order = np.lexsort((np.arange(items + 1), -wanted))[:k]
        assert np.array_equal(found.numpy(), order) and np.array_equal(found_scores.numpy(), wanted[order])
