"""Which of an encoder's K + 1 states are kept, and how each one's tokens become one vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["cls", "mean"]


def evenly(levels: int, layers: int) -> tuple[int, ...]:
    """`levels` evenly spaced states of the `layers + 1` that an encoder yields, first and last included.

    State 0 is the embedding output, state k what layer k put out. 7 of 12 layers are 0, 2, …, 12 (IISAN's
    choice). Places between two states round half up; one level alone is the last state.

    Raises:
        ValueError: fewer than 1 level, or more than there are states.
    """
    if not 1 <= levels <= layers + 1:
        raise ValueError(
            f"levels: an encoder of {layers} layers yields {layers + 1} states, expected 1 to {layers + 1} "
            f"of them, got {levels}"
        )
    if levels == 1:
        return (layers,)
    gaps = levels - 1
    return tuple((2 * level * layers + gaps) // (2 * gaps) for level in range(levels))


def choose_levels(levels: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """`evenly(levels, layers)` of a number, or a list of states, checked: rising, each in 0..`layers`."""
    if isinstance(levels, int):
        return evenly(levels, layers)
    chosen = tuple(levels)
    rising = all(low < high for low, high in pairwise(chosen))
    if not chosen or not rising or chosen[0] < 0 or chosen[-1] > layers:
        raise ValueError(f"levels: expected rising state numbers in 0 to {layers}, got {list(chosen)}")
    return chosen


def pool(tokens: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """One fp32 vector `[B, D]` of each row of `tokens` `[B, T, D]`.

    `cls` is the first token. `mean` is over every token the encoder gives for the input (for text also its
    [CLS] and [SEP], for ViT and AST also class tokens, which is what their public uses do), but for those
    that `mask` `[B, T]` (True at real tokens) calls padding.
    """
    if how == "cls":
        return tokens[:, 0].float()
    if mask is None:
        return tokens.float().mean(dim=1)
    real = mask.unsqueeze(-1)
    # Not a product with the mask: padding may hold NaN, and NaN · 0 is NaN.
    total = torch.where(real, tokens.float(), 0).sum(dim=1)
    return total / real.sum(dim=1)
