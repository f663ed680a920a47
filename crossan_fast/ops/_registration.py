"""Registers an op with torch: its schema, what runs it, its fake, its gradient; and what holds for every op:

Tensors lie on one device. The dispatcher would not mind: it goes by the tensor whose device comes first for
it, so that one weight on `meta` makes the fake run, and CPU tensors that it made without values the result.
Implementations run with autocast off: they are told what to compute in.

By hand where torch.library.custom_op would do: for each call that keeps a gradient it builds trees of the
arguments in Python and compares outputs to inputs, up to 0.1 ms a step and op, a tenth of what a loss takes
for 64 users. The same parts are registered here, and pass the same opcheck; what refuses tensors that need a
gradient, where an op has none, are the public functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from crossan_fast._checks import describe
from crossan_fast.ops import _passes
from crossan_fast.ops._dispatch import host_function

_LIBRARY = torch.library.Library("crossan_fast", "FRAGMENT")

Gradients = Sequence[Tensor | Sequence[Tensor | None] | None]
P = ParamSpec("P")
R = TypeVar("R")


def define(
    schema: str, fake: Callable[..., Any], *, one_device: bool = True, by_backend: bool = False
) -> torch._ops.OpOverload:
    """Register `crossan_fast::<schema>` with one argument more, `str backend`; returns the op.

    A call runs the `forward` of the op's implementation by that backend, or its `backward` where the name
    ends so (in a compiled library its op of that name), with the schema's arguments as they came.
    Implementations read them and return fresh tensors. A backend may be two names, of the passes
    (`_passes.joined`).

    Args:
        schema: `name(Tensor x, …) -> …`, without the backend.
        fake: shapes and dtypes of the results, from fake arguments.
        one_device: refuse tensors on several; an op that reads across devices checks for itself.
        by_backend: `fake` is told the backend, too: what it keeps for the backward is its own.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    _LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.crossan_fast, name).default
    names = tuple(argument.name for argument in op._schema.arguments)
    places = _places(op) if one_device else []
    key = name.removesuffix("_backward")
    part = "forward" if key == name else "backward"

    def run(*arguments):
        _check_devices(names, arguments, _pick(arguments, places))
        *given, backend = arguments
        with torch._C._DisableAutocast():
            return host_function(key, part, _passes.of(backend, part))(*given)

    def checked_fake(*arguments):
        _check_devices(names, arguments, _pick(arguments, places))
        return fake(*arguments) if by_backend else fake(*arguments[:-1])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"crossan_fast::{name}", checked_fake, lib=_LIBRARY)
    return op


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
    places = _places(op)
    returns_list = op._schema.returns[0].type.kind() == "ListType"
    name = op._schema.name.partition("::")[2]

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
        def backward(ctx, *gradients):
            again = torch.is_grad_enabled()  # create_graph=True
            with torch.no_grad():
                flat: list[Tensor | None] = []
                for length, found in zip(ctx.lengths, backward(ctx, *gradients), strict=True):
                    flat += [found] if length is None else found or [None] * length
            return None, *(_not_twice(name, flat) if again else flat)

    def call(*arguments):
        tensors = _pick(arguments, places)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            # Autograd follows `tensors`; `arguments` holds the same ones in their places.
            output = Differentiable.apply(arguments, *tensors)
            return list(output) if returns_list else output
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
            raise NotImplementedError(
                f"{name}: expected no forward-mode derivative (torch.func.jvp, forward_ad), which only "
                "backend='eager' has"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    _LIBRARY.impl(name, call, "Autograd")


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _not_twice(name: str, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients that raise where they are differentiated again.

    torch's `once_differentiable` does so only where what comes in requires a gradient, which the 1 of a loss
    does not: a penalty on its gradients had none itself, in silence.
    """
    message = f"{name}: expected to be differentiated once; second derivatives need backend='eager'"
    watched: list[Any] = [None if g is None else g.detach().requires_grad_() for g in gradients]
    return torch._C._functions.DelayedError(message.encode(), len(watched))(*watched)


def on_one_device(function: Callable[P, R]) -> Callable[P, R]:
    """A public op, any backend's: ValueError unless all tensors among its arguments lie on one device."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments: tuple[object, ...] = (*args, *kwargs.values())
        tensors: list[Tensor] = []
        _collect(arguments, tensors)
        _check_devices([*names[: len(args)], *kwargs.keys()], arguments, tensors)
        return function(*args, **kwargs)

    return checked


def _check_devices(names: Sequence[str], arguments: Sequence[Any], tensors: Sequence[Tensor | None]) -> None:
    """Raise unless `tensors`, all that `arguments` hold, lie on one device."""
    device = None
    for tensor in tensors:
        if tensor is not None:
            if device is None:
                device = tensor.device
            elif tensor.device != device:
                _refuse_devices(names, arguments)


def _collect(arguments: Sequence[Any], tensors: list[Tensor]) -> None:
    """Append every tensor of nested lists and tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            _collect(argument, tensors)


def _refuse_devices(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Names put together only for a complaint: the check runs at every step."""
    named = [pair for name, value in zip(names, arguments, strict=True) for pair in _named(name, value)]
    first, reference = named[0]
    for name, tensor in named:
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device} as {first}, got {describe(tensor)}")


def _named(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """`weights.gate[1]` with its tensor, and so on."""
    if isinstance(argument, Tensor):
        yield name, argument
    elif isinstance(argument, (list, tuple)):
        fields = getattr(argument, "_fields", None)
        for index, member in enumerate(argument):
            yield from _named(f"{name}.{fields[index]}" if fields else f"{name}[{index}]", member)


def _places(op: torch._ops.OpOverload) -> list[tuple[int, bool]]:
    """Which arguments of an op are tensors, and whether each is a list of them."""
    return [
        (index, argument.type.kind() == "ListType")
        for index, argument in enumerate(op._schema.arguments)
        if _is_tensors(argument.type)
    ]


def _pick(arguments: Sequence[Any], places: Sequence[tuple[int, bool]]) -> list[Tensor | None]:
    tensors: list[Tensor | None] = []
    for index, many in places:
        tensors += arguments[index] if many else (arguments[index],)
    return tensors


def _is_tensors(kind: Any) -> bool:
    """Whether a schema's type is Tensor, Tensor? or Tensor[]."""
    if kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() == "TensorType"
