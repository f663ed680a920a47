"""States to write caches of."""

from __future__ import annotations

import torch
from torch import Tensor


def make_states(items: int = 9) -> dict[str, Tensor]:
    states = {"text": torch.randn(items + 1, 2, 6), "audio": torch.randn(items + 1, 2, 3)}
    for tensor in states.values():
        tensor[0] = 0
    return states
