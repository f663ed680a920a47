"""Several processes on one run, as `torchrun --nproc-per-node N -m crossan_fast train …` starts them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among those of a run; one process alone by default.

    Attributes:
        rank: 0 to size - 1; rank 0 writes files and speaks.
        size: how many there are.
        group: what they talk through; None for one alone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over processes, in place; every process must call it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def wait(self) -> None:
        """Return when every process is here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def seed_epoch(self, seed: int, epoch: int) -> None:
        """Give processes behind the first dropout masks of their own.

        The first goes on with its generator, which its checkpoint holds; the others start each epoch anew, so
        that a resumed run draws what an uninterrupted one does.
        """
        if not self.first:
            mixed = np.random.SeedSequence([seed, epoch, self.rank]).generate_state(1)
            torch.manual_seed(int(mixed[0]))


# Groups that were left, kept until the interpreter is about to end. A DistributedDataParallel that outlives
# its group would otherwise drop the last reference while it holds Python's lock, and wait for the group's
# threads, one of which may still be waiting for that lock to drop a tensor: a process without end. Whoever
# drops it from here lets go of the lock meanwhile. An interpreter that is already ending kills a thread that
# asks for the lock, and with it the process.
_left: list[dist.ProcessGroup] = []
atexit.register(_left.clear)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Meet the processes that `torchrun` started (nccl on GPUs, one each; gloo on CPUs), and part at the end.

    Args:
        device: `auto`, `cuda` or `cpu`; a process of several takes the GPU of its local rank.

    Raises:
        ValueError: a device with an index, or fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        local, held = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= held:
            raise ValueError(f"nproc-per-node: expected at most a process a GPU, {held}, got rank {local}")
        torch.cuda.set_device(local)
        dist.init_process_group("nccl")
    elif device in ("auto", "cpu"):
        dist.init_process_group("gloo")
    else:
        raise ValueError(f"device: expected auto, cuda or cpu with several processes, got {device!r}")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        if dist.group.WORLD is not None:
            _left.append(dist.group.WORLD)
        dist.destroy_process_group()
