"""The compiled losses, rankings, fusion and deduplicate against their definitions."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from judging import judge_all, together
from torch import Tensor

from crossan_fast import _build
from crossan_fast.ops.deduplicate import deduplicate, deduplicate_reference
from crossan_fast.ops.full_loss import full_loss, full_loss_reference
from crossan_fast.ops.fusion import FusionWeights, fusion, fusion_reference
from crossan_fast.ops.in_batch_loss import in_batch_loss, in_batch_loss_by_place, in_batch_loss_reference
from crossan_fast.ops.rank_of_target import rank_of_target, rank_of_target_reference
from crossan_fast.ops.topk_scores import topk_scores, topk_scores_reference

pytestmark = pytest.mark.skipif(
    _build.PARTS["cpu"].missing() is not None, reason=f"cannot build: {_build.PARTS['cpu'].missing()}"
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN and fresh C++ memory −1.7e38, so that a read of what was not written shows."""
    perturb = getattr(ctypes.CDLL(None), "mallopt", None)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    if perturb:
        perturb(-6, 1)  # M_PERTURB
    yield
    if perturb:
        perturb(-6, 0)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def batch(size: int, sequence: int, catalogue: int, width: int, seed: int = 0):
    """users, items, slots, counts, log_popularity and ids of a left-padded batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, catalogue, (size, sequence + 1), generator=generator)
    lengths = torch.randint(0, sequence + 2, (size, 1), generator=generator)
    ids[torch.arange(sequence + 1) < sequence + 1 - lengths] = 0
    distinct, slots, counts = deduplicate_reference(ids)
    users = random(size, sequence, width, seed=seed + 1)
    items = random(len(distinct), width, seed=seed + 2)
    log_popularity = torch.log(torch.rand(len(distinct), generator=generator, dtype=torch.float64) + 0.01)
    return users, items, slots, counts, log_popularity, ids


def loss_and_grads(loss, users, items, *rest, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    users, items = users.detach().requires_grad_(), items.detach().requires_grad_()
    value = loss(users, items, *rest, **kwargs)
    return value.detach(), *torch.autograd.grad(value * 1.7, (users, items))


def assert_close(got, expected, rtol=1e-10, atol=1e-12):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("size", "sequence", "catalogue"), [(7, 4, 9), (40, 10, 700), (1, 1, 3), (3, 70, 50)]
)
def test_in_batch_loss_equals_the_definition(size, sequence, catalogue):
    users, items, slots, counts, popularity, ids = batch(size, sequence, catalogue, 13)
    got = loss_and_grads(in_batch_loss, users, items, slots, counts, popularity, backend="cpp")
    assert_close(got, loss_and_grads(in_batch_loss_reference, users, items, slots, counts, popularity))
    by_place = in_batch_loss_by_place(users, items[slots], ids, popularity[slots])
    torch.testing.assert_close(got[0], by_place)


@pytest.mark.parametrize(
    ("rows", "catalogue", "width"), [(5, 3, 7), (200, 1000, 20), (64, 240, 64), (65, 241, 130)]
)
def test_full_loss_equals_the_definition(rows, catalogue, width):
    users, items = random(rows, width) / width**0.5, random(catalogue + 1, width, seed=1)
    targets = torch.randint(0, catalogue + 1, (rows,))
    got = loss_and_grads(full_loss, users, items, targets, backend="cpp")
    assert_close(got, loss_and_grads(full_loss_reference, users, items, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_errors_are_no_worse_than_eagers(dtype):
    users, items, slots, counts, popularity, _ = batch(60, 10, 400, 64)
    users, items = (users / 4).to(dtype), items.to(dtype)
    targets = slots[:, 1:].reshape(-1)
    for op, reference, flat, rest in (
        (in_batch_loss, in_batch_loss_reference, users, (slots, counts, popularity)),
        (full_loss, full_loss_reference, users.reshape(-1, 64), (targets,)),
    ):
        names = [f"{op.__name__}: {name}" for name in ("loss", "grad_users", "grad_items")]
        truth = loss_and_grads(reference, flat.double(), items.double(), *rest)
        eager = functools.partial(loss_and_grads, op, flat, items, *rest, backend="eager")
        got = loss_and_grads(op, flat, items, *rest, backend="cpp")
        assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
        judge_all(names, got, eager, truth)


@pytest.mark.parametrize("loss", ["in batch", "full"])
def test_large_logits_round_once(loss):
    """Logits in the thousands, a row's largest far ahead: its share is 1 to the bit, as in torch."""
    users, items, slots, counts, popularity, _ = batch(40, 10, 300, 16)
    users, items = (1000 * users).float(), items.float()
    rest = (slots, counts, popularity.float())
    op, reference = in_batch_loss, in_batch_loss_reference
    if loss == "full":
        users = torch.cat([users.flatten(0, 1), 300 * items[1:]])  # the last rows' targets are far ahead
        rest = (torch.cat([slots[:, 1:].flatten(), torch.arange(1, len(items))]),)
        op, reference = full_loss, full_loss_reference
    truth = loss_and_grads(reference, users.double(), items.double(), *rest)
    got = loss_and_grads(op, users, items, *rest, backend="cpp")
    eager = functools.partial(loss_and_grads, reference, users, items, *rest)
    judge_all(("loss", "grad_users", "grad_items"), got, eager, truth)


def test_loss_gradcheck_on_the_compiled_code():
    users, items, slots, counts, popularity, _ = batch(4, 3, 6, 5)
    users, items = users.requires_grad_(), items.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, i: in_batch_loss(u, i, slots, counts, popularity, backend="cpp"), (users, items)
    )
    targets = torch.randint(0, items.shape[0], users.shape[:2])
    assert torch.autograd.gradcheck(lambda u, i: full_loss(u, i, targets, backend="cpp"), (users, items))


def test_losses_without_a_target_are_zero():
    users, items = random(2, 3, 4), random(5, 4)
    slots = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    rest = (slots, torch.tensor([0, 1, 0, 0, 0]), torch.zeros(5, dtype=torch.float64))
    for got in (
        loss_and_grads(in_batch_loss, users, items, *rest, backend="cpp"),
        loss_and_grads(full_loss, users, items, torch.zeros(2, 3, dtype=torch.int64), backend="cpp"),
        loss_and_grads(full_loss, users[:0], items, torch.zeros(0, 3, dtype=torch.int64), backend="cpp"),
    ):
        assert not any(t.any() for t in got)


def test_losses_at_extreme_scores_stay_finite():
    users, items = random(9, 4, dtype=torch.float32) * 100, random(12, 4, dtype=torch.float32) * 100
    targets = torch.arange(9) + 1
    got = loss_and_grads(full_loss, users, items, targets, backend="cpp")
    assert_close(got, loss_and_grads(full_loss_reference, users, items, targets), rtol=1e-4, atol=1e-3)


def ranking(
    batch_size: int, catalogue: int, width: int, history: int, dtype: torch.dtype, exact: bool = True
):
    """Whole numbers, on which scores are exact in any order and tie often."""
    generator = torch.Generator().manual_seed(catalogue)
    users = torch.randint(-3, 4, (batch_size, width), generator=generator).to(dtype)
    items = torch.randint(-3, 4, (catalogue + 1, width), generator=generator).to(dtype)
    targets = torch.randint(1, catalogue + 1, (batch_size,), generator=generator)
    exclude = torch.randint(-1, catalogue + 3, (batch_size, history), generator=generator)
    return users, items, targets, exclude


RANKINGS = [(1, 5, 3, 2), (70, 333, 7, 9), (130, 9000, 5, 0), (3, 20000, 64, 30), (0, 4, 2, 1), (5, 1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", RANKINGS)
def test_ranks_equal_the_definition(sizes, dtype):
    users, items, targets, exclude = ranking(*sizes, dtype)
    for excluded in (exclude, None):
        got = rank_of_target(users, items, targets, excluded, backend="cpp")
        assert torch.equal(got, rank_of_target_reference(users, items, targets, excluded))


@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", RANKINGS)
def test_best_items_equal_the_definition(sizes, dtype, k):
    users, items, _, exclude = ranking(*sizes, dtype)
    for excluded in (exclude, None):
        scores, ids = topk_scores(users, items, k, excluded, backend="cpp")
        expected_scores, expected_ids = topk_scores_reference(users, items, k, excluded)
        assert torch.equal(scores, expected_scores) and torch.equal(ids, expected_ids)


@pytest.mark.parametrize("width", [1, 5, 64, 129, 300])
def test_equal_embeddings_tie_exactly(width):
    users, one = random(3, width, dtype=torch.float32), random(1, width, seed=1, dtype=torch.float32)
    items = one.repeat(1001, 1)
    ranks = rank_of_target(users, items, torch.tensor([1, 500, 1000]), backend="cpp")
    assert ranks.tolist() == [1000] * 3


def test_rankings_of_strided_inputs_and_other_threads():
    users, items = (
        random(90, 40, dtype=torch.float32)[:, ::2],
        random(40, 3001, dtype=torch.float32).T[:, ::2],
    )
    targets, before = torch.arange(90) + 1, torch.get_num_threads()
    expected = rank_of_target(users.contiguous(), items.contiguous(), targets, backend="cpp")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(rank_of_target(users, items, targets, backend="cpp"), expected)
    finally:
        torch.set_num_threads(before)


def fusion_weights(widths: list[int], d: int, f: int, dtype: torch.dtype = torch.float64) -> FusionWeights:
    m = len(widths)

    def normal(*shape: int, scale: float) -> Tensor:
        return (random(*shape, seed=sum(shape)) * scale).to(dtype).requires_grad_()

    return FusionWeights(
        [normal(d, w, scale=w**-0.5) for w in widths],
        [normal(d, scale=0.1 + w / 1000) for w in widths],
        normal(m, m * d, scale=0.3),
        normal(m, scale=0.3),
        normal(m, f, d, scale=d**-0.5),
        normal(m, f, scale=0.1),
        normal(m, d, f, scale=f**-0.5),
        normal(m, d, scale=0.1),
    )


def fusion_run(op, hidden, weights, **kwargs) -> list[Tensor]:
    hidden = [h.detach().requires_grad_() for h in hidden]
    items, balance = op(hidden, weights, **kwargs)
    loss = (items * random(*items.shape, seed=9).to(items.dtype)).sum() + 3 * balance
    flat = [*hidden, *weights.head_weight, *weights.head_bias, *weights[2:]]
    return [items.detach(), balance.detach(), *torch.autograd.grad(loss, flat)]


@pytest.mark.parametrize("count", [0, 1, 130])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("absent", [False, True])
def test_fusion_equals_the_definition(count, top_k, absent):
    widths = [12, 20, 12]
    weights = fusion_weights(widths, 6, 10)
    hidden = [random(count, w, seed=w) for w in widths]
    generator = torch.Generator().manual_seed(5)
    present = torch.rand(count, 3, generator=generator) > 0.4 if absent else None
    counts = torch.randint(0, 5, (count,), generator=generator) if absent else None
    arguments = {"present": present, "top_k": top_k, "counts": counts}
    got = fusion_run(fusion, hidden, weights, backend="cpp", **arguments)
    assert_close(got, fusion_run(fusion_reference, hidden, weights, **arguments), rtol=1e-9, atol=1e-10)


def test_fusion_with_an_expert_that_no_item_of_a_block_chooses():
    weights, hidden = fusion_weights([12, 20], 64, 256), [random(70, w, seed=w) for w in (12, 20)]
    present = torch.tensor([True, False]).expand(70, 2)
    got = fusion_run(fusion, hidden, weights, backend="cpp", present=present, top_k=1)
    expected = fusion_run(fusion_reference, hidden, weights, present=present, top_k=1)
    assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusion_error_is_no_worse_than_eagers(dtype):
    widths = [96, 128]
    weights = fusion_weights(widths, 64, 256, dtype)
    exact = FusionWeights(
        *(
            [w.detach().double().requires_grad_() for w in g]
            if isinstance(g, list)
            else g.detach().double().requires_grad_()
            for g in weights
        )
    )
    draws = [  # a gradient of two scalars is one throw of the dice
        [random(200, w, seed=w + 1000 * draw, dtype=dtype) for w in widths] for draw in range(8)
    ]
    truth = together(fusion_run(fusion_reference, [h.double() for h in drawn], exact) for drawn in draws)
    got = together(fusion_run(fusion, drawn, weights, backend="cpp") for drawn in draws)
    judge_all(
        range(len(got)),
        got,
        lambda: together(fusion_run(fusion_reference, drawn, weights) for drawn in draws),
        truth,
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_fusion_gradcheck_on_the_compiled_code(top_k):
    widths = [3, 4, 3]
    weights = fusion_weights(widths, 4, 5)
    hidden = [random(6, w, seed=w).requires_grad_() for w in widths]
    present = torch.ones(6, 3, dtype=torch.bool)
    present[1, 0] = False

    def run(*flat: Tensor) -> tuple[Tensor, Tensor]:
        w = FusionWeights(list(flat[3:6]), list(flat[6:9]), *flat[9:])
        return tuple(fusion(flat[:3], w, present=present, top_k=top_k, backend="cpp"))

    flat = (*hidden, *weights.head_weight, *weights.head_bias, *weights[2:])
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)


def test_bits_do_not_depend_on_threads():
    users, items, slots, counts, popularity, _ = batch(60, 10, 900, 32)
    users, items = users.float(), items.float()
    weights = fusion_weights([40, 30], 16, 20, torch.float32)
    hidden = [random(500, w, seed=w, dtype=torch.float32) for w in (40, 30)]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            flat, targets = users.reshape(-1, 32), slots[:, 1:].reshape(-1)
            runs.append(
                [
                    *loss_and_grads(in_batch_loss, users, items, slots, counts, popularity, backend="cpp"),
                    *loss_and_grads(full_loss, flat, items, targets, backend="cpp"),
                    *fusion_run(fusion, hidden, weights, backend="cpp"),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("largest", [5, 63, 64, 5_000, 300_000, 2**31 - 1])
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (3, 0)])
def test_deduplicate_equals_the_definition(shape, largest, dtype):
    ids = torch.randint(0, largest, shape, dtype=dtype)
    ids.view(-1)[: 1 if shape == (5, 7) else 0] = largest
    for capacity in (None, ids.numel() + 1):
        expected = deduplicate_reference(ids, capacity)
        for x, y in zip(deduplicate(ids, capacity, backend="cpp"), expected, strict=True):
            assert torch.equal(x, y) and x.dtype == torch.int64


def test_deduplicate_takes_any_id():
    ids = torch.tensor([[2**62, 3], [0, 2**62]])
    assert [t.tolist() for t in deduplicate(ids, backend="cpp")] == [
        [0, 3, 2**62],
        [[2, 1], [0, 2]],
        [0, 1, 2],
    ]


def test_an_empty_catalogue_has_no_best_items():
    scores, ids = _library().topk_scores(torch.randn(3, 4), torch.randn(1, 4), 2, None)
    assert (scores == float("-inf")).all() and not ids.any()


def _library():
    _build.load("cpu")
    return torch.ops.crossan_fast_cpp


USERS, ITEMS = torch.randn(2, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([1, 6]), None), r"targets: .*\[1, 6\), got 6"),
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([0, 1]), None), "got 0 at place 0"),
        (lambda o: o.rank_of_target(USERS, ITEMS, torch.tensor([1]), None), "targets: expected shape"),
        (lambda o: o.rank_of_target(USERS, ITEMS[:, :3], torch.tensor([1, 1]), None), "items: expected"),
        (
            lambda o: o.rank_of_target(USERS, ITEMS.double(), torch.tensor([1, 1]), None),
            "items: expected dtype",
        ),
        (lambda o: o.topk_scores(USERS, ITEMS, 0, None), "k: expected at least 1"),
        (lambda o: o.topk_scores(USERS, ITEMS, 1, torch.zeros(3, 1).long()), "exclude: expected"),
        (lambda o: o.topk_scores(USERS, ITEMS[:0], 1, None), "items: expected"),
        (lambda o: o.full_loss(USERS, ITEMS, torch.tensor([6, 0])), "targets: .*got 6"),
        (lambda o: o.full_loss(USERS, ITEMS, torch.tensor([-1, 0])), "targets: .*got -1"),
        (lambda o: o.full_loss(USERS, ITEMS[:0], torch.tensor([0, 0])), "items"),
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
        (lambda o: o.deduplicate(torch.tensor([1, 2]), 2), "3 slots needed"),
        (lambda o: o.deduplicate(torch.tensor([-1]), 9), "got -1"),
        (lambda o: o.deduplicate(torch.tensor([1.0]), 9), "item_ids: expected dtype"),
        (lambda o: o.fusion([USERS], [ITEMS], None, None, None, torch.float32), "weights: expected 8"),
    ],
)
def test_bad_arguments_raise_with_the_argument_named(call, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        call(_library())
