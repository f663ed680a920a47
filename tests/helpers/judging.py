"""The judge of every test of accuracy: at most twice what plain torch errs by, whatever the machine.

How far plain torch is from float64 depends on the order of its sums, and that on the CPU, its BLAS and the
sizes: one order may happen to round better than any other can. So plain torch runs in several orders of the
same sums, and the worst of these is the measure. Four are enough where they err alike. Where they do not, the
result holds few numbers (a gate's gradient) or its terms nearly cancel (a query's weights'), and which order
rounds it well is chance: there many are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Sequence[Tensor]]

aten = torch.ops.aten
# The most steps of a sum that is taken term by term; longer ones go in as many groups.
STEPS = 32
# The orders that are drawn where the first ones disagree.
FURTHER = 12


def judge(name: str, actual: Tensor, eager: Sequence[Tensor], truth: Tensor) -> None:
    """Assert that `actual` is finite and errs at most twice as much as the worst of `eager`.

    Errors are norms. Half a unit in the last place of the largest entry comes on top: what rounding the exact
    result costs.
    """
    assert truth.dtype == torch.float64
    assert actual.shape == truth.shape, name
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    unit = torch.finfo(actual.dtype).eps / 2 * truth.abs().max()
    error = (actual.double() - truth).norm()
    allowed = 2 * max((run.double() - truth).norm() for run in eager) + unit
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def judge_all(names: Sequence[Any], actual: Sequence[Tensor], eager: Run, truth: Sequence[Tensor]) -> None:
    """`judge` each of an op's results; `eager` computes plain torch's, backward and all."""
    runs = in_several_orders(eager, truth)
    for name, own, theirs, exact in zip(names, actual, zip(*runs, strict=True), truth, strict=True):
        judge(str(name), own, theirs, exact)


def together(draws: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Each result of several draws of a problem as one, for what holds few numbers.

    A row's log-sum-exp is rounded once, in whatever order its terms are summed: of one row, chance decides.
    """
    return [torch.cat([result.flatten() for result in results]) for results in zip(*draws, strict=True)]


def in_several_orders(run: Run, truth: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The results in torch's own order, in two that are drawn, and with sums taken term by term.

    In `FURTHER` more where, of any result, one of these errs more than twice as much as another: the judge
    allows that factor, so they must not be that far apart by chance.
    """
    results = [run()]
    for order in (Shuffled(1), Shuffled(2), TermByTerm()):
        with order:
            results.append(run())
    if any(disagree(theirs, exact) for theirs, exact in zip(zip(*results, strict=True), truth, strict=True)):
        for seed in range(100, 100 + FURTHER):
            with Shuffled(seed):
                results.append(run())
    return results


def disagree(runs: Sequence[Tensor], truth: Tensor) -> bool:
    """Whether one of the runs errs more than twice as much as another."""
    errors = [float((run.double() - truth).norm()) for run in runs]
    return max(errors) > 2 * min(errors)


class Reordered(TorchDispatchMode):
    """Runs the operations that sum, forward and backward, in another order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = self.replacements().get(func)
        return func(*args, **(kwargs or {})) if replacement is None else replacement(*args, **(kwargs or {}))

    def replacements(self) -> dict[Any, Callable[..., Any]]:
        return {
            aten.mm.default: self.multiply,
            aten.bmm.default: self.multiply,
            aten.addmm.default: self.add_product,
            aten.sum.default: lambda x, *, dtype=None: self.sum(x.flatten(), [0], dtype=dtype),
            aten.sum.dim_IntList: self.sum,
        }

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def sum(
        self, x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        raise NotImplementedError

    def add_product(self, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # As torch does: one rounding to 16 bits, at the end.
        wide = torch.promote_types(a.dtype, torch.float32)
        return (bias.to(wide) + self.multiply(a.to(wide), b.to(wide))).to(a.dtype)


class Shuffled(Reordered):
    """The terms of every sum in an order that is drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def replacements(self) -> dict[Any, Callable[..., Any]]:
        return super().replacements() | {
            aten.logsumexp.default: self.log_sum_exp,
            aten._softmax.default: self.softmax,
            aten.native_layer_norm.default: self.layer_norm,
        }

    def order(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        order = self.order(a.shape[-1]).to(a.device)
        return torch.matmul(a[..., order], b[..., order, :])

    def sum(
        self, x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        for d in dim or range(x.dim()):
            x = x.index_select(d, self.order(x.shape[d]).to(x.device))
        return torch.sum(x, dim, keepdim, dtype=dtype)

    def log_sum_exp(self, x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
        for d in dim:
            x = x.index_select(d, self.order(x.shape[d]).to(x.device))
        return torch.logsumexp(x, dim, keepdim)

    def softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        order = self.order(x.shape[dim]).to(x.device)
        return aten._softmax(x.index_select(dim, order), dim, half_to_float).index_select(
            dim, torch.argsort(order)
        )

    def layer_norm(
        self, x: Tensor, shape: Sequence[int], gain: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        order = self.order(x.shape[-1]).to(x.device)
        gain, bias = (None if t is None else t[order] for t in (gain, bias))
        out, mean, scale = aten.native_layer_norm(x[..., order], shape, gain, bias, eps)
        return out[..., torch.argsort(order)], mean, scale


class TermByTerm(Reordered):
    """Every product and sum as its definition reads: each term is added to those before it, and rounded."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=wide, device=a.device)
        for group in torch.arange(a.shape[-1], device=a.device).tensor_split(min(STEPS, max(1, a.shape[-1]))):
            total += torch.matmul(a[..., group].to(wide), b[..., group, :].to(wide))
        return total.to(a.dtype)

    def sum(
        self, x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        wide = torch.promote_types(x.dtype if dtype is None else dtype, torch.float32)
        if not x.dtype.is_floating_point:
            return torch.sum(x, dim, keepdim, dtype=dtype)
        dims = [d % x.dim() for d in (dim or range(x.dim()))]
        if not dims:
            return x.to(x.dtype if dtype is None else dtype)
        terms = x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
        total = torch.zeros(terms.shape[1:], dtype=wide, device=x.device)
        for group in terms.tensor_split(min(STEPS, max(1, terms.shape[0]))):
            total += torch.sum(group.to(wide), 0)
        if keepdim:
            for d in sorted(dims):
                total = total.unsqueeze(d)
        return total.to(x.dtype if dtype is None else dtype)
