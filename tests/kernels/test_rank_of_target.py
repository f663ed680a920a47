"""The ranking kernel against the plain reference, on scores that floating point holds exactly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from scoring import no_numbers, ranks_by_hand

from crossan_fast.kernels import rank_of_target
from crossan_fast.ops.rank_of_target import rank_of_target_reference

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(*inputs):
    return rank_of_target.forward(*(t if t is None else t.to(DEVICE) for t in inputs)).cpu()


def make(batch, width, items, history, dtype, seed=0):
    """Small integers: exact in every type, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(-3, 4, (batch, width), generator=generator).to(dtype)
    embeddings = torch.randint(-3, 4, (items + 1, width), generator=generator).to(dtype)
    targets = torch.randint(1, items + 1, (batch,), generator=generator)
    exclude = torch.randint(0, items + 1, (batch, history), generator=generator)
    return users, embeddings, targets, exclude


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(21, 7, 301, 5), (70, 16, 90, 30), (1, 130, 45, 3)], ids=str)
def test_matches_the_reference_exactly(shape, dtype):
    users, items, targets, exclude = make(*shape, dtype)
    exclude[0, 0] = targets[0]  # the target itself is excluded
    exclude[-1, 1:] = exclude[-1, 0]  # one id again and again: off the count once
    for excluded in (exclude, None):
        ranks = kernel(users, items, targets, excluded)
        assert torch.equal(ranks, rank_of_target_reference(users, items, targets, excluded))


def test_a_constant_scorer_ranks_last():
    users, items = torch.ones(3, 8), torch.ones(61, 8)
    ranks = kernel(users, items, torch.tensor([1, 30, 60]))
    assert ranks.tolist() == [60, 60, 60]


def test_an_excluded_id_no_longer_stands_ahead():
    users, items = torch.ones(1, 1), torch.tensor([[0.0], [5.0], [4.0], [3.0], [2.0]])
    target = torch.tensor([3])
    assert kernel(users, items, target).tolist() == [3]
    assert kernel(users, items, target, torch.tensor([[1, 1, 0]])).tolist() == [2]
    assert kernel(users, items, target, torch.tensor([[1, 2, 4]])).tolist() == [1]
    assert kernel(users, items, target, torch.tensor([[3, 1, 0]])).tolist() == [4]


# In a process of its own: what it must not do ends one.
FAR = """
import torch
from crossan_fast.kernels import rank_of_target
exclude = torch.tensor([[1, -1, -(2**40), 2**40]])
users, items = torch.ones(1, 1), torch.tensor([[0.0], [5.0], [4.0], [3.0]])
print(rank_of_target.forward(users, items, torch.tensor([3]), exclude).tolist())
"""


def test_excluded_ids_that_are_none_are_not_read():
    """−1 pads the histories of other libraries; the plain reference passes over all that are no ids."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", FAR], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "[2]"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products_that_round(dtype):
    # A rank may differ from the exact one by the items whose scores lie within rounding of the target's.
    generator = torch.Generator().manual_seed(1)
    users, items = (torch.randn(n, 24, generator=generator).to(dtype) for n in (18, 400))
    targets = torch.randint(1, 400, (18,), generator=generator)
    truth = (users.double() @ items.double().T)[:, 1:]
    score = truth.gather(1, targets[:, None] - 1)
    near = 4 * torch.finfo(dtype).eps * truth.abs().max()
    ranks = kernel(users, items, targets)
    assert (ranks >= 1 + (truth > score + near).sum(1)).all()
    assert (ranks <= (truth >= score - near).sum(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_that_is_no_number_ranks_last(dtype):
    users, items, exclude, targets = no_numbers(dtype)
    nothing = torch.zeros_like(exclude)
    for excluded, given in ((exclude, exclude), (nothing, None)):
        assert kernel(users, items, targets, given).tolist() == ranks_by_hand(users, items, targets, excluded)


def test_no_users_and_strided_inputs():
    users, items, targets, exclude = make(11, 6, 90, 4, torch.float32)
    assert kernel(users[:0], items, targets[:0], exclude[:0]).shape == (0,)
    strided = (
        users.T.contiguous().T,
        torch.cat([items, items], 1)[:, :6],
        torch.stack([targets] * 2, 1)[:, 0],
        exclude.T.contiguous().T,
    )
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(kernel(*strided), rank_of_target_reference(users, items, targets, exclude))


def test_registered_op_passes_opcheck():
    inputs = [t.to(DEVICE) for t in make(3, 4, 20, 2, torch.float32)]
    torch.library.opcheck(torch.ops.crossan_fast.rank_of_target.default, (*inputs, "triton"))
