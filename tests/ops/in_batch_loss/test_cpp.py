"""The compiled in_batch_loss against its definition."""

from __future__ import annotations

import functools

import pytest
import torch
from compiled_ops import assert_close, assert_same_bits_on_any_threads, library, needs_cpp, random
from judging import judge_all
from scoring import batch, loss_and_grads

from crossan_fast.ops.in_batch_loss import in_batch_loss, in_batch_loss_by_place, in_batch_loss_reference

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]
NAMES = ("loss", "grad_users", "grad_items")


@pytest.mark.parametrize(
    ("size", "sequence", "catalogue"), [(7, 4, 9), (40, 10, 700), (1, 1, 3), (3, 70, 50)]
)
def test_equals_the_definition(size, sequence, catalogue):
    users, items, slots, counts, popularity, ids = batch(size, sequence, catalogue, 13)
    got = loss_and_grads(in_batch_loss, users, items, slots, counts, popularity, backend="cpp")
    assert_close(got, loss_and_grads(in_batch_loss_reference, users, items, slots, counts, popularity))
    by_place = in_batch_loss_by_place(users, items[slots], ids, popularity[slots])
    torch.testing.assert_close(got[0], by_place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_worse_than_eagers(dtype):
    users, items, slots, counts, popularity, _ = batch(60, 10, 400, 64)
    users, items = (users / 4).to(dtype), items.to(dtype)
    rest = (slots, counts, popularity)
    truth = loss_and_grads(in_batch_loss_reference, users.double(), items.double(), *rest)
    eager = functools.partial(loss_and_grads, in_batch_loss, users, items, *rest, backend="eager")
    got = loss_and_grads(in_batch_loss, users, items, *rest, backend="cpp")
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    judge_all(NAMES, got, eager, truth)


def test_large_logits_round_once():
    """Logits in the thousands, a row's largest far ahead: its share is 1 to the bit, as in torch."""
    users, items, slots, counts, popularity, _ = batch(40, 10, 300, 16)
    users, items = (1000 * users).float(), items.float()
    rest = (slots, counts, popularity.float())
    truth = loss_and_grads(in_batch_loss_reference, users.double(), items.double(), *rest)
    got = loss_and_grads(in_batch_loss, users, items, *rest, backend="cpp")
    eager = functools.partial(loss_and_grads, in_batch_loss_reference, users, items, *rest)
    judge_all(NAMES, got, eager, truth)


def test_gradcheck_on_the_compiled_code():
    users, items, slots, counts, popularity, _ = batch(4, 3, 6, 5)
    users, items = users.requires_grad_(), items.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, i: in_batch_loss(u, i, slots, counts, popularity, backend="cpp"), (users, items)
    )


def test_no_target_gives_zeros():
    users, items = random(2, 3, 4), random(5, 4)
    slots = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    rest = (slots, torch.tensor([0, 1, 0, 0, 0]), torch.zeros(5, dtype=torch.float64))
    assert not any(t.any() for t in loss_and_grads(in_batch_loss, users, items, *rest, backend="cpp"))


def test_bits_do_not_depend_on_threads():
    users, items, slots, counts, popularity, _ = batch(60, 10, 900, 32)
    rest = (users.float(), items.float(), slots, counts, popularity)
    assert_same_bits_on_any_threads(lambda: loss_and_grads(in_batch_loss, *rest, backend="cpp"))


USERS, ITEMS = torch.randn(2, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda o: o.in_batch_loss(
                USERS[None], ITEMS, torch.tensor([[1, 2, 6]]), torch.ones(6).long(), torch.zeros(6)
            ),
            "slots: .*got 6",
        ),
        (
            lambda o: o.in_batch_loss(
                USERS[None], ITEMS, torch.tensor([[1, 2]]), torch.ones(6).long(), torch.zeros(6)
            ),
            "slots: expected shape",
        ),
        (
            lambda o: o.in_batch_loss(
                USERS[None], ITEMS, torch.tensor([[1, 2, 3]]), torch.ones(5).long(), torch.zeros(6)
            ),
            "counts: expected shape",
        ),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(library())
