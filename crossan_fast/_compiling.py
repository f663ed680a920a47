"""A mark for the compiler that does not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Let a compiled step take what `function` answers as it is while it is being traced.

    `torch.compiler.assume_constant_result` sets this same attribute, and imports all of the compiler for it:
    half of the time that importing this library would take.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
