"""The judge of accuracy judged: it takes another order of the same sums, and refuses what is wrong a little.

Wrong results are plain torch's with one operation changed: of all matrix products, forward and backward, one
loses a term or rounds its operands or its sums to bf16; or a mask has one hole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import FURTHER, Reordered, Shuffled, TermByTerm, in_several_orders, judge
from torch import Tensor

from crossan_fast.ops import SequenceEncoderBlock, SequenceEncoderWeights
from crossan_fast.ops.full_loss import full_loss_reference
from crossan_fast.ops.fusion import FusionWeights, fusion_reference
from crossan_fast.ops.in_batch_loss import in_batch_loss_reference
from crossan_fast.ops.sequence_encoder import sequence_encoder_reference
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    side_network_reference,
)

Cast = Callable[[Tensor], Tensor]
# Of an op: its results and gradients from tensors that were cast so, and with what may be wrong.
Problem = Callable[..., list[Tensor]]


def results(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    cotangents = [draw(*output.shape, seed=99).bfloat16().to(output.dtype) for output in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def leaves_of(tensors: list[Tensor], cast: Cast) -> list[Tensor]:
    return [cast(t).requires_grad_() for t in tensors]


def in_fp32(tensors: list[Tensor]) -> list[Tensor]:
    """As the ops of the losses read 16 bits."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def full_loss(cast: Cast, rows: int = 40, forgotten: int = 0) -> list[Tensor]:
    """`forgotten`: how many of the last items are no candidates."""
    leaves = leaves_of([draw(rows, 32, seed=1, scale=0.2), draw(201, 32, seed=2)], cast)
    users, items = in_fp32(leaves)
    targets = torch.arange(rows) % 180
    return results([full_loss_reference(users, items[: 201 - forgotten], targets)], leaves)


def in_batch_loss(cast: Cast, seen: bool = False, counted: bool = True) -> list[Tensor]:
    """`seen`: an item of one sequence is a negative of its own rows; not `counted`: an id weighs once."""
    leaves = leaves_of([draw(8, 5, 32, seed=1, scale=0.2), draw(49, 32, seed=2)], cast)
    users, items = in_fp32(leaves)
    slots = torch.arange(1, 49).reshape(8, 6)
    slots[3, :2] = 0
    counts = torch.ones(49, dtype=torch.int64)
    counts[0], counts[5] = 0, 3 if counted else 1
    log_popularity = draw(49, seed=3) - 5
    if seen:  # the sequence holds item 7 under another number
        slots = torch.where(slots == 7, 49, slots)
        items, log_popularity = (torch.cat([t, t[7:8]]) for t in (items, log_popularity))
        counts = torch.cat([counts, torch.zeros_like(counts[:1])])
    return results([in_batch_loss_reference(users, items, slots, counts, log_popularity)], leaves)


def sequence_encoder(cast: Cast, hidden: bool = False) -> list[Tensor]:
    """`hidden`: one place is taken for padding."""
    width, inner, places = 16, 24, 5
    shapes = [(width, width)] * 4 + [(width,)] * 2 + [(inner, width), (inner,), (width, inner), (width,)]
    shapes = [(places, width), (width,), (width,), *shapes, (width,), (width,)]
    flat = [draw(*shape, seed=i, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes)]
    flat[9].mul_(0.1)  # no unit near ReLU's kink, where rounding would switch it
    flat[10].sign_()
    flat[10][-1] = 1
    mask = torch.arange(places) >= torch.arange(20).flip(0)[:, None] % places
    mask[4, 0] = not hidden
    items, *weights = leaves_of([draw(20, places, width, seed=50), *flat], cast)
    grouped = SequenceEncoderWeights(*weights[:3], [SequenceEncoderBlock(*weights[3:])])
    return results([sequence_encoder_reference(items, mask, grouped, 2)], [items, *weights])


def side_network(cast: Cast, absent: bool = False) -> list[Tensor]:
    """`absent`: one modality of one item is taken for missing."""
    structure = SideNetworkStructure((20, 12), ((0,), (1,)), "backbone")
    shapes = [[(2, 6, d) for d in structure.widths], [(2, 6)] * 2, [(2, d, 6) for d in structure.widths]]
    shapes += [
        [(2, d) for d in structure.widths],
        [(2,)] * 2,
        [(8, d) for d in structure.widths],
        [(8,)] * 2,
        [(2,)] * 2,
        [(6, 12), (6, 20)],
        [(20, 6), (12, 6)],
    ]
    flat = [draw(*shape, seed=i, scale=0.3) for i, shape in enumerate(s for group in shapes for s in group)]
    weights = leaves_of(flat, cast)
    states = [cast(draw(40, 2, d, seed=90 + d)) for d in structure.widths]
    present = torch.ones(40, 2, dtype=torch.bool)
    present[::7, 0] = False
    present[3, 1] = not absent
    e = side_network_reference(states, structure.unflatten(weights), structure, present=present)
    return results([e], weights)


def fusion(cast: Cast, absent: bool = False) -> list[Tensor]:
    """`absent`: one modality of one item is taken for missing."""
    shapes = [(2, 16), (2,), (2, 24, 8), (2, 24), (2, 8, 24), (2, 8)]
    weights = [draw(*shape, seed=i, scale=0.3) for i, shape in enumerate(shapes)]
    leaves = leaves_of([draw(40, 2, 8, seed=20), *weights], cast)
    present = torch.ones(40, 2, dtype=torch.bool)
    present[3, 1] = not absent
    out = fusion_reference(leaves[0], FusionWeights(*leaves[1:]), present=present)
    return results([out.items], leaves)


PROBLEMS: dict[str, Problem] = {
    "full_loss": full_loss,
    "full_loss of few rows": lambda cast, **changes: full_loss(cast, 3, **changes),
    "in_batch_loss": in_batch_loss,
    "sequence_encoder": sequence_encoder,
    "side_network": side_network,
    "fusion": fusion,
}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("full_loss", {"forgotten": 1}),
    ("full_loss of few rows", {"forgotten": 1}),
    ("in_batch_loss", {"seen": True}),
    ("in_batch_loss", {"counted": False}),
    ("sequence_encoder", {"hidden": True}),
    ("side_network", {"absent": True}),
    ("fusion", {"absent": True}),
]


def without_last_term(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a[..., :-1], b[..., :-1, :])


def with_operands_in_bf16(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.bfloat16().to(a.dtype), b.bfloat16().to(a.dtype))


def with_sums_in_bf16(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b).bfloat16().to(a.dtype)


class Mutated(Reordered):
    """Changes the product that is number `which`."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], which: int) -> None:
        super().__init__()
        self.change, self.which, self.products = change, which, 0

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        self.products += 1
        return (self.change if self.products - 1 == self.which else torch.matmul)(a, b)

    def sum(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return torch.sum(x, *rest, **options)


def judged(problem: Problem, dtype: torch.dtype) -> tuple[Cast, list[Any], list[Tensor]]:
    """The cast to `dtype`, plain torch's runs in it, and what is true of the values that it leaves."""
    truth = problem(lambda t: t.to(dtype).double())
    return lambda t: t.to(dtype), in_several_orders(lambda: problem(lambda t: t.to(dtype)), truth), truth


def refused(found: list[Tensor], runs: list[Any], truth: list[Tensor]) -> bool:
    try:
        for index, (own, theirs, exact) in enumerate(zip(found, zip(*runs, strict=True), truth, strict=True)):
            judge(str(index), own, theirs, exact)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_another_order_passes(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    cast, runs, truth = judged(problem, dtype)
    for order in (Shuffled(11), Shuffled(12), TermByTerm()):
        with order:
            found = problem(cast)
        assert not refused(found, runs, truth)


@pytest.mark.parametrize(("growth", "orders"), [(0.0, 4), (0.3, 4), (0.4, 4 + FURTHER)])
def test_more_orders_are_taken_where_they_disagree(growth: float, orders: int) -> None:
    truth, calls = torch.ones(5, dtype=torch.float64), 0

    def run() -> list[Tensor]:
        nonlocal calls
        calls += 1
        return [truth + 1e-3 * (1 + growth * (calls - 1))]

    assert len(in_several_orders(run, [truth])) == calls == orders


def test_the_truth_rounded_passes() -> None:
    for name, problem in PROBLEMS.items():
        _, runs, truth = judged(problem, torch.float32)
        assert not refused([t.float() for t in truth], runs, truth), name


@pytest.mark.parametrize("change", [without_last_term, with_operands_in_bf16, with_sums_in_bf16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_wrong_product_is_refused(name: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    problem = PROBLEMS[name]
    cast, runs, truth = judged(problem, torch.float32)
    which, count = 0, 1
    while which < count:
        with Mutated(change, which) as mode:
            found = problem(cast)
        count = mode.products
        assert refused(found, runs, truth), f"product {which} of {count}"
        which += 1
    assert count >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_one_hole_in_a_mask_is_refused(name: str, change: dict[str, Any], dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    cast, runs, truth = judged(problem, dtype)
    assert refused(problem(cast, **change), runs, truth)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(spoil: float) -> None:
    truth = torch.ones(3, dtype=torch.float64)
    found = torch.tensor([1.0, spoil, 1.0])
    assert refused([found], [[torch.full((3,), 1e9)]], [truth])
