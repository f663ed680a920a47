"""The compiled sequence encoder against its definition."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import needs_cpp
from judging import judge_all
from sequence_encoders import MASK, SEED, encoder, grouped, problem, run

from crossan_fast import _build
from crossan_fast.ops import _dispatch
from crossan_fast.ops.sequence_encoder import (
    EPS,
    kept_width,
    sequence_encoder,
    sequence_encoder_reference,
)

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]


SHAPES = [
    # batch, places, width, heads, inner, blocks, window
    (5, 4, 6, 2, 10, 2, 7),
    (64, 10, 64, 2, 256, 2, 10),
    (3, 37, 48, 3, 50, 1, 40),  # longer than a block of rows
    (300, 10, 16, 1, 64, 1, 10),  # more rows than a part of the backward
    (2, 3, 130, 13, 70, 3, 3),
    (9, 5, 8, 4, 8, 0, 5),
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, dropout):
    batch, places, width, heads, inner, blocks, window = shape
    items, mask, flat = problem(batch, places, width, inner, blocks, window)
    kwargs = {"dropout": dropout, "seed": SEED if dropout else None}
    want = run(items, mask, flat, heads, sequence_encoder_reference, **kwargs)
    for have, truth in zip(run(items, mask, flat, heads, backend="cpp", **kwargs), want, strict=True):
        torch.testing.assert_close(have, truth, rtol=1e-9, atol=1e-11)


def test_any_mask():
    """Holes, rows of padding, and none."""
    items, _, flat = problem(40, 6, window=6)
    for mask in (torch.rand(40, 6) > 0.5, torch.zeros(40, 6).bool(), torch.ones(40, 6).bool()):
        want = run(items, mask, flat, 3, sequence_encoder_reference, dropout=0.2, seed=SEED)
        for have, truth in zip(
            run(items, mask, flat, 3, backend="cpp", dropout=0.2, seed=SEED), want, strict=True
        ):
            torch.testing.assert_close(have, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_empty(size):
    items, _, flat = problem()
    users, grad, *rest = run(items.new_zeros(*size, 6), torch.ones(size).bool(), flat, 2, backend="cpp")
    assert users.shape == grad.shape == (*size, 6)
    assert not any(g.any() for g in rest)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "dropout"), [(64, 0.0), (64, 0.2), (700, 0.2), pytest.param(700, 0.0, marks=pytest.mark.long)]
)
def test_errors_are_no_worse_than_eagers(dtype, dropout, batch):
    items, mask, flat = problem(batch, 10, 64, 256, 2, 10, dtype)
    kwargs = {"dropout": dropout, "seed": SEED}
    truth = run(items.double(), mask, [w.double() for w in flat], 2, sequence_encoder_reference, **kwargs)
    got = run(items, mask, flat, 2, backend="cpp", **kwargs)
    assert all(x.dtype == dtype for x in got)
    judge_all(
        range(len(got)),
        got,
        lambda: run(items, mask, flat, 2, sequence_encoder_reference, **kwargs),
        truth,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_on_the_compiled_code(dropout):
    items, mask, flat = problem()

    def call(items, *flat):
        return sequence_encoder(items, mask, grouped(flat), 2, dropout=dropout, seed=SEED, backend="cpp")

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (items, *flat)])


def test_registration():
    items, mask, flat = problem(full=True)
    op = torch.ops.crossan_fast.sequence_encoder
    for seed, dropout in ((None, 0.0), (SEED, 0.4)):
        torch.library.opcheck(
            op.default, (items, mask, flat, 2, EPS, dropout, seed, False, torch.float64, "cpp")
        )
        leaves = [t.detach().requires_grad_() for t in (items, *flat)]
        arguments = (leaves[0], mask, leaves[1:], 2, EPS, dropout, seed, True, torch.float64, "cpp")
        # What is kept has gaps that nobody writes, where a run differs from the next; what is made of it by a
        # traced graph is compared in the test below.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=utils)
    assert op(*arguments)[1].shape == (mask.numel(), kept_width(6, 10, 2, 2))


def test_compiles_whole_with_dynamic_sizes():
    module = encoder(dropout=0.3)

    def step(items, mask):
        return module(items, mask, backend="cpp").square().sum()

    traced = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 2, 3):
        items, mask = torch.randn(batch, 5, 16), MASK[:batch]
        found = []
        for call in (traced, step):
            torch.manual_seed(11)
            module.zero_grad()
            call(items, mask).backward()
            found.append([p.grad.clone() for p in module.parameters()])
        for have, want in zip(*found, strict=True):
            torch.testing.assert_close(have, want)


def test_same_bits_on_any_number_of_threads():
    items, mask, flat = problem(300, 10, 64, 256, 2, 10, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(items, mask, flat, 2, backend="cpp", dropout=0.2, seed=SEED))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_users_do_not_depend_on_their_batch():
    """Neither on how rows are packed: the same user alone, and among others, has the same bits."""
    items, mask, flat = problem(30, 10, 64, 256, 2, 10, torch.float32)
    weights = grouped(flat)
    whole = sequence_encoder(items, mask, weights, 2, backend="cpp")
    for b in range(30):
        assert torch.equal(
            sequence_encoder(items[b : b + 1], mask[b : b + 1], weights, 2, backend="cpp")[0], whole[b]
        )


def test_padding_reaches_nothing():
    items, mask, flat = problem(20, 10, 64, 256, 2, 10)
    poisoned = torch.where(mask[..., None], items, float("nan"))
    clean = run(items, mask, flat, 2, backend="cpp", dropout=0.2, seed=SEED)
    for a, b in zip(run(poisoned, mask, flat, 2, backend="cpp", dropout=0.2, seed=SEED), clean, strict=True):
        assert torch.equal(a, b)
    assert not clean[0][~mask].any() and not clean[1][~mask].any()


def test_strides_and_partial_gradients():
    items, mask, flat = problem(8, 4, 12, 20)
    views = [w.T.contiguous().T if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in flat]
    items_view = items.transpose(0, 1).contiguous().transpose(0, 1)
    want = run(items, mask, flat, 2, backend="cpp")
    for a, b in zip(run(items_view, mask.T.contiguous().T, views, 2, backend="cpp"), want, strict=True):
        assert torch.equal(a, b)
    flat[6].requires_grad_()  # one block's output product, nothing else
    users = sequence_encoder(items, mask, grouped(flat), 2, backend="cpp")
    (found,) = torch.autograd.grad(users.sum(), [flat[6]])
    reference = sequence_encoder_reference(items, mask, grouped(flat), 2)
    torch.testing.assert_close(found, torch.autograd.grad(reference.sum(), [flat[6]])[0])


# -- the module ------------------------------------------------------------------------------------------


def test_module_in_eval_equals_eager():
    module = encoder(dropout=0.5).eval()
    items = torch.randn(4, 5, 16)
    want = module(items, MASK, backend="eager")
    torch.testing.assert_close(module(items, MASK, backend="cpp")[MASK], want[MASK])
    assert _dispatch.choose("sequence_encoder", "cpu", torch.float32).backend == "cpp"


def test_module_under_autocast_keeps_the_type_of_eager():
    module = encoder()
    for dtype in (torch.float32, torch.bfloat16):
        items = torch.randn(4, 5, 16).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            have, want = (module(items, MASK, backend=backend) for backend in ("cpp", "eager"))
        assert have.dtype == want.dtype == torch.float32
        have.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_module_dropout_repeats_under_a_seed_and_differs_between_steps():
    module, items = encoder(dropout=0.3), torch.randn(4, 5, 16)
    torch.manual_seed(5)
    first, second = module(items, MASK, backend="cpp"), module(items, MASK, backend="cpp")
    torch.manual_seed(5)
    assert torch.equal(module(items, MASK, backend="cpp"), first)
    assert not torch.equal(first, second)


def test_module_dropout_is_eagers_in_the_mean():
    """Over many draws both have one mean and one variance: the same places are dropped, at the same rate."""
    module, items, draws = encoder(dropout=0.3, blocks=1), torch.randn(1, 5, 16), 3000
    moments = []
    for backend in ("eager", "cpp"):
        many = items.expand(draws, -1, -1), torch.ones(draws, 5).bool()
        with torch.no_grad():
            users = module(*many, backend=backend).double()
        moments.append((users.mean(0), users.std(0)))
    (mean, std), (other_mean, other_std) = moments
    assert ((mean - other_mean).abs() / std).max() < 5 * (2 / draws) ** 0.5
    assert (std / other_std - 1).abs().max() < 0.12


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (2, [torch.zeros(1)], r"weights: expected 3 tensors and 12 a block, got 1"),
        (3, 5, r"heads: expected a divisor of 6, got 5"),
        (4, 0.0, r"eps: expected a positive number"),
        (5, 1.5, r"dropout: expected a probability"),
        (6, torch.zeros(2, dtype=torch.int64), r"seed: expected shape \[\]"),
        (1, torch.ones(3, 4).bool(), r"mask: expected shape \[4, 3\]"),
    ],
)
def test_the_library_checks_for_itself(index, value, message):
    items, mask, flat = problem()
    arguments = [items, mask, flat, 2, 1e-6, 0.1, SEED, True, torch.float64]
    arguments[index] = value
    _build.load("cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.crossan_fast_cpp.sequence_encoder(*arguments)
