"""An exponential moving average of the weights, kept beside them: what is evaluated and saved as the best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average ← average + (1 − decay) · (weights − average), once a step.

    The decay of step t (from 0) is at most (1 + t) / (10 + t), so that the start is soon forgotten. Nothing
    is read back from the device.

    Args:
        model: whose parameters are averaged; buffers are not.
        decay: in (0, 1); 0.998 remembers about 500 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._average = {name: weight.clone() for name, weight in self._weights.items()}

    @property
    def _weights(self) -> dict[str, Tensor]:
        # Anew each time: a parameter may be given other memory, as a table of ids that grows.
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within the block, and its own again behind it."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(own)

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name, for a checkpoint."""
        return self._average

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave; ValueError where the names differ."""
        if tensors.keys() != self._average.keys():
            raise ValueError("checkpoint: expected an average of every parameter of the model")
        for name, value in tensors.items():
            self._average[name].copy_(value)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(source.values()))
