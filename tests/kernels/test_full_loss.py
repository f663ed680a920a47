"""The full-catalogue loss kernel against the reference in float64."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from judging import judge_all, together

from crossan_fast.kernels import full_loss
from crossan_fast.ops.full_loss import full_loss as full_loss_op
from crossan_fast.ops.full_loss import full_loss_reference

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
RESULTS = ("loss", "grad_users", "grad_items")


def make(rows, width, items, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(rows, width, generator=generator).to(dtype)
    embeddings = torch.randn(items + 1, width, generator=generator).to(dtype)
    targets = torch.randint(1, items + 1, (rows,), generator=generator)
    targets[::5] = 0
    return users, embeddings, targets


def reference(users, items, targets, dtype):
    users, items = users.to(dtype).requires_grad_(), items.to(dtype).requires_grad_()
    loss = full_loss_reference(users, items, targets)
    return loss.detach(), *torch.autograd.grad(loss, (users, items), -1.3 * torch.ones_like(loss))


def forward(*inputs):
    return [out.cpu() for out in full_loss.forward(*(t.to(DEVICE) for t in inputs))]


def kernel(*inputs):
    inputs = [t.to(DEVICE) for t in inputs]
    loss, lse = full_loss.forward(*inputs)
    gradients = full_loss.backward(torch.tensor(-1.3, device=DEVICE), lse, *inputs)
    return [out.cpu() for out in (loss, *gradients)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 77, "width": 20, "items": 210},
        {"rows": 3, "width": 64, "items": 401},
        {"rows": 131, "width": 5, "items": 2},
        {"rows": 2, "width": 130, "items": 70},
        {"rows": 2, "width": 300, "items": 33},
    ],
    ids=str,
)
def test_matches_float64(shape, dtype):
    draws = [make(**shape, dtype=dtype, seed=seed) for seed in range(8 if shape["rows"] < 5 else 1)]
    actual = [kernel(*inputs) for inputs in draws]

    def plain(dtype):
        return together(reference(*inputs, dtype) for inputs in draws)

    judge_all(RESULTS, together(actual), lambda: plain(dtype), plain(torch.float64))
    for _, grad_users, grad_items in actual:
        assert grad_users.dtype == grad_items.dtype == dtype
        assert not grad_items[0].any(), "padding is no candidate"


def test_wider_users_are_narrowed_as_they_are_read():
    users, items, targets = make(77, 20, 210, torch.bfloat16)
    wide = users.float() + 1e-5 * torch.randn(users.shape)
    found, expected = kernel(wide, items, targets), kernel(wide.bfloat16(), items, targets)
    assert found[1].dtype == torch.float32 and not torch.equal(found[1], found[1].bfloat16().float())
    for own, theirs in zip(found, expected, strict=True):
        assert torch.equal(own.to(theirs.dtype), theirs)


def test_log_sum_exp_of_rows_with_and_without_a_target():
    users, items, targets = make(30, 16, 90, torch.float32)
    _, lse = forward(users, items, targets)
    truth = torch.logsumexp(users.double() @ items[1:].double().T, dim=1)
    torch.testing.assert_close(lse.double()[targets != 0], truth[targets != 0], rtol=1e-6, atol=1e-6)
    assert (lse[targets == 0] == float("inf")).all()


def test_shares_below_the_smallest_half_precision_number_keep_their_gradient():
    # 60 columns each hold a share of 2^−26, less than fp16's smallest subnormal; the target holds the rest.
    items = torch.zeros(62, 16, dtype=torch.float16)
    items[1, 0] = 18.0215
    items[2:, 1] = torch.linspace(1, 2, 60)
    users = torch.zeros(1, 16, dtype=torch.float16)
    users[0, 0] = 1
    inputs = users, items, torch.tensor([1])
    actual, truth = kernel(*inputs), reference(*inputs, torch.float64)
    assert 0 < truth[1][0, 1].abs() < 1e-5
    torch.testing.assert_close(actual[1][0, 1].double(), truth[1][0, 1], rtol=0.02, atol=6e-8)


@pytest.mark.parametrize("rows", [0, 7])
def test_no_row_with_a_target(rows):
    users, items, targets = torch.randn(rows, 8), torch.randn(20, 8), torch.zeros(rows, dtype=torch.int64)
    loss, grad_users, grad_items = kernel(users, items, targets)
    assert loss == 0 and not grad_users.any() and not grad_items.any()
    assert grad_users.shape == users.shape and grad_items.shape == items.shape


def test_strides_do_not_matter_and_runs_repeat_bit_for_bit():
    users, items, targets = make(70, 24, 150, torch.bfloat16)
    expected = kernel(users, items, targets)
    strided = (
        users.T.contiguous().T,
        torch.cat([items, items], 1)[:, :24],
        torch.stack([targets] * 2, 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in strided)
    for repeat in (kernel(*strided), kernel(users, items, targets)):
        for a, b in zip(repeat, expected, strict=True):
            assert torch.equal(a, b)


def test_registered_op_passes_opcheck_and_compiles_with_dynamic_sizes():
    users, items, targets = (t.to(DEVICE) for t in make(7, 8, 20, torch.float32))
    inputs = users.requires_grad_(), items.requires_grad_(), targets
    torch.library.opcheck(torch.ops.crossan_fast.full_loss.default, (*inputs, "triton"))

    op = functools.partial(full_loss_op, backend="triton")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        inputs = [t.to(DEVICE) for t in make(rows, 8, 20, torch.float32)]
        torch.testing.assert_close(compiled(*inputs), full_loss_reference(*inputs))
