"""The sequence encoder's kernels against the reference in float64, and against the compiled op."""

from __future__ import annotations

import os

import pytest
import torch
from compiled_ops import needs_cpp
from judging import judge_all
from sequence_encoders import SEED, grouped, problem, run

from crossan_fast.kernels import _common
from crossan_fast.kernels.sequence_encoder import host
from crossan_fast.kernels.sequence_encoder.weight_gradient_kernels import sum_kernel, sums_kernel
from crossan_fast.ops import _dispatch, sequence_encoder
from crossan_fast.ops._dispatch import Request
from crossan_fast.ops.sequence_encoder import EPS, sequence_encoder_reference

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

# batch, places, width, heads, inner, blocks, window: few, as the interpreter takes a second for a sequence.
SHAPES = [
    (3, 4, 6, 2, 10, 2, 7),
    (2, 10, 64, 2, 256, 2, 10),
    (1, 37, 48, 3, 50, 1, 40),
    (1, 64, 16, 1, 40, 1, 64),
]


def given(*arguments, **options):
    """`problem` where the kernels run."""
    items, mask, flat = problem(*arguments, **options)
    return items.to(DEVICE), mask.to(DEVICE), [w.to(DEVICE) for w in flat]


def compare(items, mask, flat, heads, **kwargs):
    if "seed" in kwargs:
        kwargs["seed"] = kwargs["seed"].to(DEVICE)
    truth = run(items.double(), mask, [w.double() for w in flat], heads, sequence_encoder_reference, **kwargs)
    have = run(items, mask, flat, heads, backend="triton", **kwargs)
    assert [t.dtype for t in have[1:]] == [t.dtype for t in (items, *flat)]

    def eager():
        return run(items, mask, flat, heads, sequence_encoder_reference, **kwargs)

    judge_all(range(len(have)), have, eager, truth)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape):
    batch, places, width, heads, inner, blocks, window = shape
    drawn = given(batch, places, width, inner, blocks, window, torch.float32, full=batch == 1)
    compare(*drawn, heads, dropout=0.3, seed=SEED)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("shape", [(3, 37, 48, 3, 50, 1, 40), (7, 11, 6, 2, 70, 2, 11)], ids=str)
def test_sums_in_parts_match_float64(monkeypatch, shape):
    """Of so many places that a program no longer sums all of them: 4 and 3 parts."""
    launched = []
    monkeypatch.setattr(host, "_AT_ONCE", 0)

    def launch(kernel, grid, *arguments, **options):
        launched.append((kernel, grid))
        _common.launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(host, "launch", launch)
    batch, places, width, heads, inner, blocks, window = shape
    compare(*given(batch, places, width, inner, blocks, window, torch.float32), heads)
    assert launched[-2][0] is sums_kernel and launched[-2][1][1] > 2
    assert launched[-1][0] is sum_kernel


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 32), (torch.bfloat16, 128), (torch.float16, 32)], ids=str
)
def test_half_precision_matches_float64(dtype, width):
    compare(*given(2, 10, width, 80, 1, 12, dtype, full=True), 2, dropout=0.2, seed=SEED)


@needs_cpp
@pytest.mark.parametrize("dropout", [0.0, 0.6])
def test_equals_the_compiled_op(dropout):
    """The same masks, too: one number more or less that is dropped would show."""
    items, mask, flat = problem(2, 17, 64, 96, 1, 18, torch.float32, full=True)
    wanted = run(items, mask, flat, 2, backend="cpp", dropout=dropout, seed=SEED)
    found = run(
        items.to(DEVICE), mask.to(DEVICE), [w.to(DEVICE) for w in flat], 2,
        backend="triton", dropout=dropout, seed=SEED.to(DEVICE),
    )  # fmt: skip
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_any_mask():
    """Holes, rows of padding, and none."""
    items, _, flat = given(4, 6, window=6, blocks=1, dtype=torch.float32)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 1], [0] * 6, [1] * 6]).bool()
    compare(items, mask.to(DEVICE), flat, 3, dropout=0.2, seed=SEED)


def test_padding_reaches_nothing():
    items, mask, flat = given(3, 10, 16, 20, 1, 10, torch.float32, full=True)
    mask[0] = False
    poisoned = torch.where(mask[..., None], items, float("nan"))
    seed = SEED.to(DEVICE)
    clean = run(items, mask, flat, 2, backend="triton", dropout=0.2, seed=seed)
    found = run(poisoned, mask, flat, 2, backend="triton", dropout=0.2, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert not clean[0][~mask].any() and not clean[1][~mask].any()


def test_users_do_not_depend_on_their_batch_and_runs_repeat_bit_for_bit():
    items, mask, flat = given(3, 10, 16, 20, 1, 10, torch.float32, full=True)
    first, second = (
        run(items, mask, flat, 2, backend="triton", dropout=0.2, seed=SEED.to(DEVICE)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    whole = sequence_encoder(items, mask, grouped(flat), 2, backend="triton")
    alone = sequence_encoder(items[2:], mask[2:], grouped(flat), 2, backend="triton")
    assert torch.equal(alone[0], whole[2])


def test_strides_and_types_that_differ():
    """fp32 weights under bf16 items, as autocast gives them, and one weight in bf16: fp32 computes."""
    items, mask, flat = given(2, 4, 12, 20, 1, 4, torch.float32, full=True)
    views = [w.T.contiguous().T if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in flat]
    wide = items.bfloat16()
    view = wide.transpose(0, 1).contiguous().transpose(0, 1)
    want = run(wide, mask, flat, 2, backend="triton")
    found = run(view, mask.T.contiguous().T, views, 2, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert want[0].dtype == torch.float32 and want[1].dtype == torch.bfloat16
    rounded = [*flat[:6], flat[6].bfloat16(), *flat[7:]]
    found = run(wide, mask, rounded, 2, backend="triton")
    want = run(wide, mask, [w.float() for w in rounded], 2, backend="triton")
    assert found[8].dtype == torch.bfloat16
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_empty(size):
    items, _, flat = given(dtype=torch.float32)
    users, grad, *rest = run(
        items.new_zeros(*size, 6), torch.ones(size).bool().to(DEVICE), flat, 2, backend="triton"
    )
    assert users.shape == grad.shape == (*size, 6)
    assert not any(g.any() for g in rest)


def test_registered_op_passes_opcheck():
    items, mask, flat = given(2, 3, 6, 10, 1, dtype=torch.float32, full=True)
    op, seed = torch.ops.crossan_fast.sequence_encoder.default, SEED.to(DEVICE)
    torch.library.opcheck(op, (items, mask, flat, 2, EPS, 0.4, seed, False, torch.float32, "triton"))
    leaves = [t.requires_grad_() for t in (items, *flat)]
    arguments = (leaves[0], mask, leaves[1:], 2, EPS, 0.4, seed, True, torch.float32, "triton")
    # What is kept has gaps that nobody writes, where a run differs from the next.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=utils)


@pytest.mark.parametrize(
    ("dtype", "features", "reason"),
    [
        ("float32", ("window=65", "width=64", "blocks=2"), "serves at most 64 places, got 65"),
        ("float32", ("window=10", "width=66", "blocks=2"), "at most 64 numbers a place in torch.float32"),
        ("bfloat16", ("window=10", "width=130", "blocks=2"), "at most 128 numbers a place in torch.bfloat16"),
        ("float32", ("window=10", "width=64", "blocks=0"), "serves at least one block, got none"),
        ("float32", ("window=64", "width=64", "blocks=1"), None),
        ("bfloat16", ("window=64", "width=128", "blocks=1"), None),
    ],
)
def test_what_it_serves_is_what_cuda_runs(monkeypatch, dtype, features, reason):
    request = Request("sequence_encoder", "cuda", getattr(torch, dtype), features)
    monkeypatch.setattr(_common, "refuses_device", lambda device: None)
    if reason is None:
        assert _dispatch._choose.__wrapped__(request, "auto").backend == "triton"
    else:
        with pytest.warns(_dispatch.FallbackWarning, match=reason):
            assert _dispatch._choose.__wrapped__(request, "auto").backend == "eager"
