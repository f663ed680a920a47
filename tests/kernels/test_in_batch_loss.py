"""The in-batch loss kernel against the reference in float64."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from judging import judge_all, together

from crossan_fast._losses import last_alone
from crossan_fast.kernels import _streaming_loss, in_batch_loss
from crossan_fast.ops.deduplicate import deduplicate_reference
from crossan_fast.ops.in_batch_loss import in_batch_loss as in_batch_loss_op
from crossan_fast.ops.in_batch_loss import in_batch_loss_reference

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
RESULTS = ("loss", "grad_users", "grad_items")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, length, width, items, dtype, seed=0, capacity=None):
    """Sequences with left padding, repeated items and one user without any."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, items + 1, (batch, length + 1), generator=generator)
    for b in range(batch):
        ids[b, : b % (length + 1)] = 0
    if batch > 2:
        ids[2] = 0
    ids, slots, counts = deduplicate_reference(ids, capacity)
    users = torch.randn(batch, length, width, generator=generator).to(dtype)
    embeddings = torch.randn(len(ids), width, generator=generator).to(dtype)
    log_popularity = -5 * torch.rand(len(ids), generator=generator)
    return users, embeddings, slots, counts, log_popularity


def reference(users, items, *rest, dtype):
    users, items = users.to(dtype).requires_grad_(), items.to(dtype).requires_grad_()
    loss = in_batch_loss_reference(users, items, *rest)
    return loss.detach(), *torch.autograd.grad(loss, (users, items), 0.7 * torch.ones_like(loss))


def forward(*inputs):
    return [out.cpu() for out in in_batch_loss.forward(*(t.to(DEVICE) for t in inputs))]


def kernel(*inputs):
    inputs = [t.to(DEVICE) for t in inputs]
    loss, lse = in_batch_loss.forward(*inputs)
    gradients = in_batch_loss.backward(torch.tensor(0.7, device=DEVICE), lse, *inputs)
    return [out.cpu() for out in (loss, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_places_alone_against_draws(dtype):
    """As `targets="last"` and `loss="sampled"` call it: padding between a row's items, columns of no draw."""
    users, items, slots, counts, log_popularity = make(9, 5, 20, 60, torch.float32)
    users, slots = last_alone(users, slots)
    drawn = torch.arange(len(counts)) % 3
    inputs = (users.to(dtype), items.to(dtype), slots, drawn, log_popularity)
    truth = reference(*inputs, dtype=torch.float64)
    actual = kernel(*inputs)
    judge_all(RESULTS, actual, lambda: reference(*inputs, dtype=dtype), truth)
    assert actual[1][:, -1].any() and not actual[1][:, :-1].any(), "the others are no rows"


def test_one_program_or_several_write_the_same_loss(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    slots = torch.randint(0, 30, (9, 5), generator=generator)
    users, items = torch.randn(9, 4, 8, generator=generator), torch.randn(30, 8, generator=generator)
    inputs = (users, items, slots, torch.bincount(slots.flatten(), minlength=30), -torch.rand(30))
    one = kernel(*inputs)
    monkeypatch.setattr(_streaming_loss, "_ROWS", 16)
    for several, alone in zip(kernel(*inputs), one, strict=True):
        torch.testing.assert_close(several, alone)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        # Several blocks of rows and of columns; nearly every column someone's own; one row a sequence; a
        # sequence longer than its block's share of rows.
        {"batch": 13, "length": 7, "width": 20, "items": 150, "capacity": 160},
        {"batch": 5, "length": 10, "width": 64, "items": 23},
        {"batch": 3, "length": 1, "width": 3, "items": 300},
        {"batch": 2, "length": 50, "width": 33, "items": 40},
    ],
    ids=str,
)
def test_matches_float64(shape, dtype):
    # One row has a target where the histories are of one place.
    draws = [make(**shape, dtype=dtype, seed=seed) for seed in range(8 if shape["length"] == 1 else 1)]
    actual = [kernel(*inputs) for inputs in draws]

    def plain(dtype):
        return together(reference(*inputs, dtype=dtype) for inputs in draws)

    judge_all(RESULTS, together(actual), lambda: plain(dtype), plain(torch.float64))
    for loss, grad_users, grad_items in actual:
        assert loss.dtype == torch.float32 and grad_users.dtype == grad_items.dtype == dtype


@pytest.mark.sweep(1)
@pytest.mark.parametrize("few", [4096, 7])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wider_users_are_narrowed_as_they_are_read(dtype, few, monkeypatch):
    """As under autocast, where the sequence encoder's are fp32: the numbers of users narrowed before."""
    monkeypatch.setattr(_streaming_loss, "_FEW", few)
    users, items, *rest = make(13, 7, 20, 150, dtype, capacity=160)
    wide = users.float() + 1e-5 * torch.randn_like(users.float())
    found, expected = kernel(wide, items, *rest), kernel(wide.to(dtype), items, *rest)
    assert found[1].dtype == torch.float32 and found[2].dtype == dtype
    assert few < 13 * 7 or not torch.equal(found[1], found[1].to(dtype).float()), "it is rounded no more"
    for own, theirs in zip(found, expected, strict=True):
        assert torch.equal(own.to(theirs.dtype), theirs)


def test_log_sum_exp_is_infinite_exactly_where_a_row_has_no_target():
    inputs = make(6, 5, 16, 30, torch.float32)
    _, lse = forward(*inputs)
    slots = inputs[2]
    torch.testing.assert_close(lse == float("inf"), (slots[:, :-1] == 0) | (slots[:, 1:] == 0))


def test_a_column_of_count_zero_weighs_nothing_and_gets_no_gradient():
    users, items, slots, counts, log_popularity = make(6, 5, 16, 30, torch.float32, capacity=50)
    unused = counts == 0
    loud = items.clone()
    loud[unused] = 1e4
    quiet = kernel(users, items.masked_fill(unused[:, None], 0), slots, counts, log_popularity)
    for a, b in zip(kernel(users, loud, slots, counts, log_popularity), quiet, strict=True):
        assert torch.equal(a, b)
    assert not quiet[2][unused].any()


def test_two_users_by_hand():
    # Users 0 and 1 each saw two items of their own: one negative column of count 2 and one of count 1 each.
    slots = torch.tensor([[1, 2], [3, 3]])
    counts = torch.tensor([0, 1, 1, 2])
    items = torch.tensor([[9.0], [1.0], [2.0], [3.0]])
    users = torch.tensor([[[1.0]], [[0.5]]])
    log_popularity = torch.log(torch.tensor([1.0, 0.25, 0.25, 0.5]))
    s = users.double().reshape(2, 1) * items.double().reshape(1, 4) - log_popularity.double()
    first = -s[0, 2] + torch.log(s[0, 2].exp() + 2 * s[0, 3].exp())
    second = -s[1, 3] + torch.log(s[1, 3].exp() + s[1, 1].exp() + s[1, 2].exp())
    loss, _ = forward(users, items, slots, counts, log_popularity)
    torch.testing.assert_close(loss.double(), (first + second) / 2, rtol=1e-6, atol=0)


def test_large_logits_do_not_overflow():
    users, *rest = make(5, 6, 8, 60, torch.float32)
    inputs = 200 * users, *rest
    truth = reference(*inputs, dtype=torch.float64)
    judge_all(RESULTS, kernel(*inputs), lambda: reference(*inputs, dtype=torch.float32), truth)


@pytest.mark.parametrize("batch", [0, 4])
def test_no_row_with_a_target(batch):
    users, items = torch.randn(batch, 3, 8), torch.randn(5, 8)
    slots = torch.zeros(batch, 4, dtype=torch.int64)
    loss, grad_users, grad_items = kernel(
        users, items, slots, torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    )
    assert loss == 0 and not grad_users.any() and not grad_items.any()
    assert grad_users.shape == users.shape and grad_items.shape == items.shape


def test_strides_do_not_matter_and_runs_repeat_bit_for_bit():
    users, items, slots, counts, log_popularity = make(9, 6, 24, 90, torch.bfloat16)
    expected = kernel(users, items, slots, counts, log_popularity)
    wide_users = torch.full((9, 12, 48), float("nan"), dtype=users.dtype)
    wide_users[:, ::2, ::2] = users
    strided = (
        wide_users[:, ::2, ::2],
        items.T.contiguous().T,
        torch.stack([slots, slots], -1)[..., 0],
        counts,
        log_popularity,
    )
    assert not any(t.is_contiguous() for t in strided[:3])
    for repeat in (kernel(*strided), kernel(users, items, slots, counts, log_popularity)):
        for a, b in zip(repeat, expected, strict=True):
            assert torch.equal(a, b)


def test_registered_op_passes_opcheck_and_compiles_with_dynamic_sizes():
    op = torch.ops.crossan_fast.in_batch_loss.default
    users, items, *rest = (t.to(DEVICE) for t in make(4, 3, 8, 20, torch.float32))
    torch.library.opcheck(op, (users.requires_grad_(), items.requires_grad_(), *rest, "triton"))
    narrow = items.detach().bfloat16().requires_grad_()
    torch.library.opcheck(op, (users.detach().requires_grad_(), narrow, *rest, "triton"))

    op = functools.partial(in_batch_loss_op, backend="triton")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        inputs = [t.to(DEVICE) for t in make(batch, 3, 8, 20, torch.float32)]
        torch.testing.assert_close(compiled(*inputs), in_batch_loss_reference(*inputs))


@pytest.mark.parametrize("wanted", [0, 1])
def test_either_gradient_alone(wanted):
    inputs = [t.to(DEVICE) for t in make(4, 3, 8, 20, torch.float32)]
    inputs[wanted].requires_grad_()
    gradients = [
        torch.autograd.grad(loss, inputs[wanted])[0]
        for loss in (in_batch_loss_op(*inputs, backend="triton"), in_batch_loss_reference(*inputs))
    ]
    torch.testing.assert_close(*gradients)
