"""The compiled full_loss against its definition."""

from __future__ import annotations

import functools

import pytest
import torch
from compiled_ops import assert_close, assert_same_bits_on_any_threads, library, needs_cpp, random
from judging import judge_all
from scoring import batch, loss_and_grads

from crossan_fast.ops.full_loss import full_loss, full_loss_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]
NAMES = ("loss", "grad_users", "grad_items")


@pytest.mark.parametrize(
    ("rows", "catalogue", "width"), [(5, 3, 7), (200, 1000, 20), (64, 240, 64), (65, 241, 130)]
)
def test_equals_the_definition(rows, catalogue, width):
    users, items = random(rows, width) / width**0.5, random(catalogue + 1, width, seed=1)
    targets = torch.randint(0, catalogue + 1, (rows,))
    got = loss_and_grads(full_loss, users, items, targets, backend="cpp")
    assert_close(got, loss_and_grads(full_loss_reference, users, items, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_worse_than_eagers(dtype):
    users, items, slots, *_ = batch(60, 10, 400, 64)
    users, items = (users / 4).to(dtype).reshape(-1, 64), items.to(dtype)
    rest = (slots[:, 1:].reshape(-1),)
    truth = loss_and_grads(full_loss_reference, users.double(), items.double(), *rest)
    eager = functools.partial(loss_and_grads, full_loss, users, items, *rest, backend="eager")
    got = loss_and_grads(full_loss, users, items, *rest, backend="cpp")
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    judge_all(NAMES, got, eager, truth)


def test_large_logits_round_once():
    """Logits in the thousands, a row's largest far ahead: its share is 1 to the bit, as in torch."""
    users, items, slots, *_ = batch(40, 10, 300, 16)
    users, items = (1000 * users).float(), items.float()
    users = torch.cat([users.flatten(0, 1), 300 * items[1:]])  # the last rows' targets are far ahead
    targets = torch.cat([slots[:, 1:].flatten(), torch.arange(1, len(items))])
    truth = loss_and_grads(full_loss_reference, users.double(), items.double(), targets)
    got = loss_and_grads(full_loss, users, items, targets, backend="cpp")
    eager = functools.partial(loss_and_grads, full_loss_reference, users, items, targets)
    judge_all(NAMES, got, eager, truth)


def test_gradcheck_on_the_compiled_code():
    users, items, *_ = batch(4, 3, 6, 5)
    users, items = users.requires_grad_(), items.requires_grad_()
    targets = torch.randint(0, items.shape[0], users.shape[:2])
    assert torch.autograd.gradcheck(lambda u, i: full_loss(u, i, targets, backend="cpp"), (users, items))


def test_no_target_gives_zeros():
    users, items = random(2, 3, 4), random(5, 4)
    for rows in (users, users[:0]):
        targets = torch.zeros(rows.shape[:2], dtype=torch.int64)
        assert not any(t.any() for t in loss_and_grads(full_loss, rows, items, targets, backend="cpp"))


def test_extreme_scores_stay_finite():
    users, items = random(9, 4, dtype=torch.float32) * 100, random(12, 4, dtype=torch.float32) * 100
    targets = torch.arange(9) + 1
    got = loss_and_grads(full_loss, users, items, targets, backend="cpp")
    assert_close(got, loss_and_grads(full_loss_reference, users, items, targets), rtol=1e-4, atol=1e-3)


def test_bits_do_not_depend_on_threads():
    users, items, slots, *_ = batch(60, 10, 900, 32)
    rest = (users.float().reshape(-1, 32), items.float(), slots[:, 1:].reshape(-1))
    assert_same_bits_on_any_threads(lambda: loss_and_grads(full_loss, *rest, backend="cpp"))


USERS, ITEMS = torch.randn(2, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.full_loss(USERS, ITEMS, torch.tensor([6, 0])), "targets: .*got 6"),
        (lambda o: o.full_loss(USERS, ITEMS, torch.tensor([-1, 0])), "targets: .*got -1"),
        (lambda o: o.full_loss(USERS, ITEMS[:0], torch.tensor([0, 0])), "items"),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(library())
