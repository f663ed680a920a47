"""Named ranges for `torch.profiler`.

Registered ops carry their names by themselves (`crossan_fast::side_network`, `…_backward`); these ranges name
the parts of a step on every backend, plain torch included.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def span(name: str) -> AbstractContextManager[object]:
    """A range `crossan_fast.<name>`; costs next to nothing while no profiler runs."""
    # A compiled graph has no ranges of the host's, and the question would break it.
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"crossan_fast.{name}")
