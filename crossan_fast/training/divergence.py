"""Whether a run learns anything: its losses against that of a model that knows nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from crossan_fast.training.step import REMEDY, TrainingError

# An untrained model's losses differ by some per cent between batches; a run that learns nothing stays there.
FACTOR = 1.25
EXIT_STATUS = 3


def ignorance(history: Sequence[Mapping[str, Any]], columns: int) -> float:
    """The loss of knowing nothing: the run's first step's, or log(`columns`), all of them equally likely.

    The larger of the two: the first step's counts the debiasing by popularity and what else the loss has, the
    other one keeps a first step that was lucky from setting the measure.
    """
    return max(math.log(columns), history[0].get("first_loss", 0.0))


def diverged(history: Sequence[Mapping[str, Any]], columns: int) -> bool:
    """Whether the last epoch's mean loss is more than `FACTOR` times that of knowing nothing."""
    return bool(history[-1]["loss"] > FACTOR * ignorance(history, columns))


def warning(history: Sequence[Mapping[str, Any]], columns: int) -> str:
    """What `diverged` means, in words."""
    last = history[-1]
    return (
        f"diverged: the mean loss of epoch {last['epoch']} is {last['loss']:.4g}, more than {FACTOR} times "
        f"the {ignorance(history, columns):.4g} of a model that knows nothing; {REMEDY}"
    )


def refuse_nothing_learned(losses: Tensor, epoch: int) -> None:
    """Raise where a run's first epoch had a loss of exactly 0 at every step, as without any negative."""
    if epoch == 1 and not bool(losses.any()):
        raise TrainingError(
            f"loss: 0 at each of the {losses.numel()} steps of epoch 1: no row had an item to tell its "
            "target from; expected batches of several users with different items (batch_size, users)"
        )
