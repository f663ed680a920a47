"""Registers an op with torch: its schema, what runs it, its fake, its gradient.

By hand where torch.library.custom_op would do: for each call that keeps a gradient it builds trees of the
arguments in Python and compares outputs to inputs, up to 0.1 ms a step and op, a tenth of what a loss takes
for 64 users. The same parts are registered here, and pass the same opcheck; what refuses tensors that need a
gradient, where an op has none, are the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossan_fast.ops._dispatch import implementation

_LIBRARY = torch.library.Library("crossan_fast", "FRAGMENT")

Gradients = Sequence[Tensor | Sequence[Tensor | None] | None]


def define(schema: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register `crossan_fast::<schema>` with one argument more, `str backend`; returns the op.

    A call runs the `forward` of the op's implementation by that backend, or its `backward` where the name
    ends so, and hands it the schema's arguments as they came. Implementations read them and return fresh
    tensors.

    Args:
        schema: `name(Tensor x, …) -> …`, without the backend.
        fake: shapes and dtypes of the results, from fake arguments.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    op = name.removesuffix("_backward")
    part = "forward" if op == name else "backward"

    def run(*arguments):
        *given, backend = arguments
        return getattr(implementation(op, backend), part)(*given)

    _LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"crossan_fast::{name}", lambda *arguments: fake(*arguments[:-1]), lib=_LIBRARY
    )
    return getattr(torch.ops.crossan_fast, name).default


def differentiate(
    op: torch._ops.OpOverload,
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Gradients],
) -> None:
    """Give an op its gradient.

    Args:
        op: what `define` returned.
        keep: `keep(ctx, arguments, output)`: saves what the backward needs.
        backward: `backward(ctx, *gradients of the outputs)`, None for an output that has none; returns one
            for each tensor argument in the schema's order, a list of them for a list of tensors, or None.
    """
    places = [
        (index, argument.type.kind() == "ListType")
        for index, argument in enumerate(op._schema.arguments)
        if _is_tensors(argument.type)
    ]
    returns_list = op._schema.returns[0].type.kind() == "ListType"

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, arguments, *tensors):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            ctx.set_materialize_grads(False)
            ctx.lengths = [len(arguments[index]) if many else None for index, many in places]
            keep(ctx, arguments, output)
            return tuple(output) if returns_list else output

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            flat: list[Tensor | None] = [None]
            for length, found in zip(ctx.lengths, backward(ctx, *gradients), strict=True):
                flat += [found] if length is None else found or [None] * length
            return tuple(flat)

    def call(*arguments):
        tensors: list[Tensor | None] = []
        for index, many in places:
            tensors += arguments[index] if many else (arguments[index],)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            # Autograd follows `tensors`; `arguments` holds the same ones in their places.
            output = Differentiable.apply(arguments, *tensors)
            return list(output) if returns_list else output
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    _LIBRARY.impl(op._schema.name.partition("::")[2], call, "Autograd")


def _is_tensors(kind: Any) -> bool:
    """Whether a schema's type is Tensor, Tensor? or Tensor[]."""
    if kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() == "TensorType"
