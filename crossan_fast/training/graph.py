"""The training step as CUDA graphs: one for each shape of batch and number of slots, one launch a step.

A step is a few hundred kernels of microseconds each; launching them one by one takes longer than running
them. The first steps of a shape run eagerly on a stream of their own (kernels compile, libraries make their
workspaces, AdamW its state), the next is captured, the others are replays: new ids are copied into the buffer
that the graph reads, the learning rate is a tensor on the device, and dropout's generator advances by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crossan_fast._sources import ReadAhead
from crossan_fast.training.step import NOTHING_AHEAD, TrainStep

Body = Callable[[], Tensor]


class Graphs(Protocol):
    """How steps are captured; a test puts a recorder in its place."""

    def warm(self, body: Body) -> Tensor:
        """Run `body` as it will be captured."""
        ...

    def capture(self, body: Body) -> tuple[Callable[[], None], Tensor]:
        """Record `body` without running it; gives what replays it, and the tensor it writes.

        Raises:
            RuntimeError: `body` does what cannot be captured.
        """
        ...


class CudaGraphs:
    """Graphs of one device that share memory: no two replay at once, and each one's loss is copied out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm(self, body: Body) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = body()
        current.wait_stream(self._stream)
        loss.record_stream(current)
        return loss

    def capture(self, body: Body) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = body()
        return graph.replay, loss


class _Key(NamedTuple):
    """What a graph is good for."""

    shape: torch.Size
    dtype: torch.dtype
    capacity: int | None


@dataclass
class _Entry:
    item_ids: Tensor  # what the graph reads
    seen: int = 0
    replay: Callable[[], None] | None = None
    loss: Tensor | None = None


class GraphedStep:
    """Stands for a `TrainStep`: same call, same results.

    Args:
        step: on a CUDA device, `refusal(step)` being None.
        graphs: the device's, by default.
        warmup: eager steps of a shape before its capture.
        most: graphs kept; batches of further shapes run eagerly.

    Attributes:
        reason: why steps run eagerly since a capture failed; None: none did.
    """

    def __init__(
        self, step: TrainStep, graphs: Graphs | None = None, *, warmup: int = 3, most: int = 16
    ) -> None:
        self.step = step
        self.reason: str | None = None
        self._graphs = graphs if graphs is not None else CudaGraphs(step.device)
        self._warmup, self._most = warmup, most
        self._entries: dict[_Key, _Entry] = {}
        self._held: tuple[int, ...] = ()

    def __call__(self, item_ids: Tensor, ahead: ReadAhead = NOTHING_AHEAD) -> Tensor:
        """As `TrainStep`; a graph is made for each capacity, and none reads gathered rows."""
        self.step.set_rate()
        loss = self._compute(item_ids, ahead)
        self.step.finish()
        return loss

    def _compute(self, item_ids: Tensor, ahead: ReadAhead) -> Tensor:
        held = self._addresses()
        if held != self._held:
            # Graphs hold addresses: a weight or a buffer that moved leaves them reading freed memory.
            self._entries.clear()
            self._held = held
        key = _Key(item_ids.shape, item_ids.dtype, ahead.capacity)
        entry = self._entries.get(key)
        full = entry is None and len(self._entries) == self._most
        # Rows lie elsewhere in every step; a graph would go on reading those of its capture.
        if self.reason is not None or full or ahead.gathered is not None:
            return self.step.compute(item_ids, ahead)
        if entry is None:
            entry = self._entries[key] = _Entry(torch.empty_like(item_ids))
        entry.item_ids.copy_(item_ids)

        def body() -> Tensor:
            return self.step.compute(entry.item_ids, ahead)

        if entry.replay is None and entry.seen < self._warmup:
            entry.seen += 1
            return self._graphs.warm(body)
        if entry.replay is None:
            try:
                entry.replay, entry.loss = self._graphs.capture(body)
            except RuntimeError as error:
                self.reason = f"capture failed: {str(error).splitlines()[0]}"
                self._entries.clear()
                warnings.warn(f"steps run one kernel at a time: {self.reason}", stacklevel=3)
                return self.step.compute(item_ids, ahead)
        entry.replay()
        assert entry.loss is not None
        return entry.loss.clone()  # the next replay, of this graph or another, writes over it

    def _addresses(self) -> tuple[int, ...]:
        model = self.step.model
        return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))


def refusal(step: TrainStep) -> str | None:
    """Why a step cannot be captured, or None."""
    if step.device.type != "cuda":
        return f"graphs need a CUDA device, got {step.device}"
    if step.group is not None:
        return "gradients are shared between processes while they are being made"
    if step.cache.tier != "resident":
        return f"the host gathers rows for each step (cache {step.cache.tier})"
    if step.model.config.attention == "xformers":
        return "attention 'xformers' passes sequence lengths through the host"
    return None
