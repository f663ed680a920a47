"""Evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module.eval()`, and back to the mode it was in, whatever happens inside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
