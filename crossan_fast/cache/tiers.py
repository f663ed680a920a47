"""Where a cache's states live: on the device, in page-locked host memory, or in a memory-mapped file."""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast.cache.format import REMEDY, CorruptCacheError

Tier = Literal["resident", "pinned", "mmap"]

# A training step, its optimizer and the allocators' slack need the other half; torch's allocator of
# page-locked memory alone rounds up to a power of two.
_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Placement:
    """The tier a cache is on for a device, and why."""

    device: torch.device
    tier: Tier
    reason: str


def choose_tier(
    size: int,
    device: torch.device,
    *,
    device_free: int,
    host_free: int,
    asked: str = "auto",
    on_disk: bool = True,
) -> Placement:
    """Pick the fastest tier that `size` bytes of states fit, or check the one asked for.

    `resident` where they fit half of the free memory of `device`; else, for a GPU, `pinned` where they fit
    half of the host's; else `mmap`, which a cache that is not on disk cannot use.

    Raises:
        ValueError: `asked` is no tier, or cannot serve this device or this cache.
    """
    if asked != "auto" and asked not in get_args(Tier):
        raise ValueError(
            f"tier: expected auto, {', '.join(get_args(Tier))}, got {asked!r}{nearest(asked, get_args(Tier))}"
        )
    if asked == "pinned" and device.type != "cuda":
        raise ValueError(
            f"tier: pinned host memory serves CUDA devices only, got device {device}; use resident or mmap"
        )
    if asked == "mmap" and not on_disk:
        raise ValueError("tier: mmap needs a cache opened from a folder; this one is in memory")
    if asked != "auto":
        return Placement(device, cast(Tier, asked), "asked for")
    need = f"{_gigabytes(size)} of states"
    fits = f"{need}, {_gigabytes(device_free)} free on {device}"
    if size <= _SHARE * device_free:
        return Placement(device, "resident", fits)
    if device.type == "cuda" and size <= _SHARE * host_free:
        return Placement(device, "pinned", f"{fits} and {_gigabytes(host_free)} on the host")
    if not on_disk:
        return Placement(device, "resident", f"{fits}; more than half, but the cache is not on disk")
    return Placement(
        device, "mmap", f"{fits}; more than half" + (" of either" if device.type == "cuda" else "")
    )


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    return host_memory()


def host_memory() -> int:
    """Bytes of host memory available without swapping, within the control group's limit.

    Pages of files count as available, in the group as in the whole system: they are given up for others.
    """
    kilobytes = _read_table(Path("/proc/meminfo")).get("MemAvailable:")
    if kilobytes is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    else:
        available = kilobytes * 1024
    limit, used = (_read_int(_CGROUP / f"memory.{what}") for what in ("max", "current"))
    if limit is not None and used is not None:
        parts = _read_table(_CGROUP / "memory.stat")
        used -= parts.get("inactive_file", 0) + parts.get("active_file", 0)
        available = min(available, max(limit - max(used, 0), 0))
    return available


class MappedFile:
    """The first `size` bytes of a file, read from disk page by page as they are touched.

    The mapping is private: writing to the tensor changes neither the file nor what another process sees.

    Attributes:
        bytes: uint8 `[size]`; may outlive this object.
        descriptor: of the same file, wherever its path leads by now; closed with this object.
        path, size: as given.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        if hasattr(mmap, "MAP_PRIVATE"):
            # Without MAP_NORESERVE (0x4000 on Linux; named in mmap from Python 3.13 on) the kernel refuses
            # private writable mappings larger than memory and swap together.
            noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
            mapping = mmap.mmap(
                self.descriptor,
                size,
                flags=mmap.MAP_PRIVATE | noreserve,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        else:
            mapping = mmap.mmap(self.descriptor, size, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8, count=size)

    def require_whole(self) -> None:
        """Raise CorruptCacheError where the file is shorter by now: touching what it lacks is a SIGBUS."""
        have = os.fstat(self.descriptor).st_size
        if have < self.size:
            raise CorruptCacheError(
                f"{self.path}: expected {self.size} bytes, as when it was opened, got {have}: it was cut "
                f"while in use; {REMEDY}"
            )


def pick_rows(source: Tensor, rows: Tensor, target: torch.device) -> Tensor:
    """`source[rows]` on `target`; from the host to a GPU through page-locked memory, without waiting."""
    # One-byte floats are moved as bytes: not every device gathers them.
    raw = source.view(torch.uint8) if source.dtype == torch.float8_e4m3fn else source
    if source.device.type == "cpu" and target.type == "cuda":
        shape = (len(rows), *source.shape[1:])
        staged = torch.empty(shape, dtype=raw.dtype, pin_memory=True)
        picked = torch.index_select(raw, 0, rows, out=staged).to(target, non_blocking=True)
    else:
        picked = raw.index_select(0, rows).to(target)
    return picked.view(source.dtype)


def exact_device(device: str | torch.device) -> torch.device:
    """With its index, so that `cuda` and `cuda:0` are one."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"device: {device} cannot be used: {str(error).splitlines()[0]}") from error


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Numbers by name, one of each a line; empty where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
