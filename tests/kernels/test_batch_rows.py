"""Rows of a batch, and what is said of them added up, against the definition in float64."""

from __future__ import annotations

import itertools
import random

import calls.batch_rows
import pytest
import torch
from judging import judge_all

from crossan_fast import ops
from crossan_fast.kernels import batch_rows
from crossan_fast.ops.batch_rows import batch_rows_reference

NAMES = ("columns", "histories", "by_place", "log_popularity", "gradient")


def make(device, batch, places, width, dtype, spare=0, seed=0):
    """Sequences with padding in front, items that many have, and slots that nobody uses."""
    generator = torch.Generator().manual_seed(seed)
    item_ids = torch.randint(1, 3 * places + 2, (batch, places), generator=generator)
    for row in range(batch):
        item_ids[row, : row % places] = 0
    ids, slots, _ = ops.deduplicate_reference(item_ids, len(item_ids.unique()) + 1 + spare)
    embeddings = torch.randn(len(ids), width, generator=generator).to(dtype)
    popularity = torch.rand(3 * places + 2, generator=generator) + 1e-6
    return [tensor.to(device) for tensor in (embeddings, slots, ids, popularity)]


def cotangents(inputs, which):
    """Of the three outputs that have a gradient; None for those that nothing reads."""
    embeddings, slots = inputs[:2]
    (batch, places), width, generator = slots.shape, embeddings.shape[1], torch.Generator().manual_seed(9)
    shapes = ((len(embeddings), width), (batch, places - 1, width), (batch, places, width))
    drawn = [torch.randn(shape, generator=generator).to(embeddings) for shape in shapes]
    return [grad if used else None for grad, used in zip(drawn, which, strict=True)]


def reference(inputs, grads, dtype):
    embeddings = inputs[0].to(dtype).requires_grad_()
    found = batch_rows_reference(embeddings, inputs[1], inputs[2], inputs[3].to(dtype))
    used = [(out, g.to(dtype)) for out, g in zip(found, grads, strict=False) if g is not None]
    outs, given = zip(*used, strict=True)
    gradient = torch.autograd.grad(outs, embeddings, given)
    return [t.detach() for t in (*found[:3], found.log_popularity, *gradient)]


def kernel(inputs, grads):
    columns, histories, by_place, mask, log_popularity = batch_rows.forward(*inputs)
    assert mask.dtype == torch.bool and torch.equal(mask, inputs[1][:, :-1] != 0)
    gradient = batch_rows.backward(*grads, inputs[1], *inputs[0].shape, inputs[0].dtype)
    return [columns, histories, by_place, log_popularity, gradient]


@pytest.mark.sweep(8)
@pytest.mark.parametrize("most", [batch_rows.MOST, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "places", "width", "spare"), [(13, 7, 20, 9), (2, 60, 130, 0), (5, 2, 1, 200), (6, 1, 16, 3)]
)
def test_matches_float64(device, batch, places, width, spare, dtype, most, monkeypatch):
    monkeypatch.setattr(batch_rows, "MOST", most)
    inputs = make(device, batch, places, width, dtype, spare)
    grads = cotangents(inputs, (True, True, True))
    truth = reference(inputs, grads, torch.float64)
    found = kernel(inputs, grads)
    assert [t.dtype for t in found] == [dtype] * 3 + [torch.float32, dtype]
    judge_all(NAMES, found, lambda: reference(inputs, grads, dtype), truth)


@pytest.mark.parametrize("which", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_outputs_that_nothing_reads(device, which):
    inputs = make(device, 9, 5, 24, torch.float32, 4)
    grads = cotangents(inputs, which)
    expected = reference(inputs, grads, torch.float64)[-1]
    torch.testing.assert_close(kernel(inputs, grads)[-1].double(), expected, rtol=1e-5, atol=1e-6)


def test_strides_do_not_matter_and_runs_repeat_bit_for_bit(device):
    inputs = make(device, 9, 6, 24, torch.bfloat16)
    grads = cotangents(inputs, (True, True, True))
    expected = kernel(inputs, grads)
    strided = [tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in inputs]
    loose = [grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in grads]
    for found in (kernel(strided, loose), kernel(inputs, grads)):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_no_items_or_users(device):
    embeddings, slots, ids, popularity = make(device, 3, 4, 8, torch.float32)
    found = batch_rows.forward(embeddings, slots[:0], ids, popularity)
    assert torch.equal(found[0], embeddings) and found[1].shape == (0, 3, 8)
    grads = [torch.ones_like(tensor) for tensor in found[:3]]
    assert torch.equal(batch_rows.backward(*grads, slots[:0], *embeddings.shape, embeddings.dtype), grads[0])


def test_registered_op_passes_opcheck_and_its_gradient_is_eager_s(device):
    embeddings, *rest = make(device, 4, 3, 8, torch.float32, 2)
    embeddings.requires_grad_()
    torch.library.opcheck(torch.ops.crossan_fast.batch_rows.default, (embeddings, *rest, "triton"))
    gradients = []
    for backend in ("triton", "eager"):
        rows = ops.batch_rows(embeddings, *rest, backend=backend)
        loss = (rows.columns.sin() * 2).sum() + rows.histories.exp().sum()  # nothing reads `by_place`
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
    torch.testing.assert_close(*gradients)


def test_random_calls(device):
    """What is right in shape and range; whatever is not is refused before a kernel runs."""
    random.seed(0)
    for _ in range(40):
        arguments = calls.batch_rows.draw()
        if arguments[0].dtype == torch.float64:
            continue
        arguments = tuple(tensor.to(device) for tensor in arguments)
        try:
            found = ops.batch_rows(*arguments, backend="triton")
        except ValueError as error:
            assert "expected" in str(error)
            continue
        for name, own, theirs in zip(found._fields, found, batch_rows_reference(*arguments), strict=True):
            if name == "log_popularity":
                torch.testing.assert_close(own, theirs)
            else:
                assert torch.equal(own, theirs), name
