"""The training step as CUDA graphs: one for each shape of batch and number of slots, one launch a step.

A step is a few hundred kernels of microseconds each; launching them one by one takes longer than running
them. The first steps of a shape run eagerly on a stream of their own (kernels compile, libraries make their
workspaces, AdamW its state), the next is captured, the others are replays: new ids are copied into the buffer
that the graph reads, the learning rate is a tensor on the device, and dropout's generator advances by itself.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
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
            RuntimeError: `body` does what cannot be captured; what it computes afterwards is then no other
                than if it had never been tried.
        """
        ...


class CudaGraphs:
    """Graphs of one device that share memory: no two replay at once, and each one's loss is copied out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._abandoned: list[torch.cuda.CUDAGraph] = []

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
        current = torch.cuda.current_stream(self._device)
        try:
            # Of a capture whose end raises, torch leaves the stream current; the outer block goes back.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss = body()
        except RuntimeError:
            self._abandon(graph)
            raise
        return graph.replay, loss

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what torch (2.11; later versions less) leaves of a capture that was invalidated.

        Its end raises before it clears up: the generator goes on as if captured, and refuses to draw; the
        allocator keeps back what other streams free, for as long as it believes a capture to be under way.
        """
        graph.reset()
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with contextlib.suppress(RuntimeError):  # where torch has ended it
            torch._C._cuda_endAllocateToPool(index, self._pool)
        # A copy of the state has seed and offset, but takes no part in a capture.
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        # The allocator of page-locked memory may still ask the graph whose capture a stream is in.
        self._abandoned.append(graph)


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
    norm: Tensor | None = None


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
                with _nothing_computed(self.step):
                    entry.replay, entry.loss = self._graphs.capture(body)
                    entry.norm = self.step.gradient_norm
            except RuntimeError as error:
                self.reason = f"capture failed: {_cause(error)}"
                self._entries.clear()
                warnings.warn(f"steps run one kernel at a time: {self.reason}", stacklevel=3)
                return self.step.compute(item_ids, ahead)
        entry.replay()
        assert entry.loss is not None and entry.norm is not None
        self.step.gradient_norm = entry.norm
        return entry.loss.clone()  # the next replay, of this graph or another, writes over it

    def _addresses(self) -> tuple[int, ...]:
        model = self.step.model
        return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def _nothing_computed(step: TrainStep) -> Iterator[None]:
    """Where the block raises, nothing that it queued has run: generators, gradients and optimizer go back.

    Weights, and the optimizer's states there were, are written by what was queued alone.
    """
    states = step.optimizer.state
    known = set(states)
    on_device = step.device.type == "cuda"
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(step.device) if on_device else None
    try:
        yield
    except RuntimeError:
        step.optimizer.zero_grad(set_to_none=True)  # they lie in the memory of the graph
        for parameter in set(states) - known:
            del states[parameter]
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], step.device)
        raise


def _cause(error: BaseException) -> str:
    """The first line of what went wrong: a capture's end says no more than that something did before."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


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
