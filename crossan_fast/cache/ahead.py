"""Reading what comes next in background threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from crossan_fast.cache.staging import Rows

Job = TypeVar("Job")
Result = TypeVar("Result")


def read_ahead(
    jobs: Iterable[Job], read: Callable[[Job], Result], depth: int, threads: int = 1
) -> Generator[tuple[Job, Result], None, None]:
    """`(job, read(job))` of each job in order, the next `depth` being read by `threads` threads meanwhile.

    An error of `read` is raised where its result would have been yielded. Leaving early drops what was not
    begun.
    """
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="crossan_fast-read")
    try:
        for job in jobs:
            waiting.append((job, pool.submit(read, job)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def gather_ahead(
    batches: Iterable[Tensor], gather: Callable[[Tensor], Rows], device: torch.device, depth: int
) -> Iterator[tuple[Tensor, Rows]]:
    """`read_ahead` of rows for `device`.

    For a GPU they come on a stream of their own, and are ready on the stream that is current when yielded.
    """
    if device.type != "cuda":
        yield from read_ahead(batches, gather, depth)
        return
    side = torch.cuda.Stream(device)

    def on_side(ids: Tensor) -> tuple[Rows, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return gather(ids), side.record_event()

    for ids, (rows, event) in read_ahead(batches, on_side, depth):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in rows.tensors():
            tensor.record_stream(current)  # else its memory could be given out again while still in use
        yield ids, rows
