"""Where a step's time goes: `crossan-fast train config.yaml --profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from crossan_fast._profiling import span
from crossan_fast.training.precision import computing_in
from crossan_fast.training.trainer import Trainer

PARTS = ("data", "side_network", "fusion", "sequence_encoder", "loss", "backward", "optimizer")
_WARMUP = 5


@dataclass(frozen=True)
class StepProfile:
    """Means over the profiled steps, in seconds.

    Attributes:
        step: wall time of a step, without the profiler.
        parts: share of the profiled steps by part; `other` is what lies in none of them.
        floor: what the side network's arithmetic and bytes alone would take at this machine's measured
            ceilings.
        bound: which of the two the floor is, in words.
        trace: the Chrome trace.
    """

    step: float
    parts: dict[str, float]
    floor: float
    bound: str
    trace: Path

    def __str__(self) -> str:
        lines = [f"{'part':<18} {'share':>7} {'ms':>9}"]
        for name, share in self.parts.items():
            lines.append(f"{name:<18} {100 * share:6.1f} % {1e3 * share * self.step:8.3f}")
        lines.append(f"{'step':<18} {100:6.1f} % {1e3 * self.step:8.3f}")
        lines.append(
            f"floor {1e3 * self.floor:.3f} ms ({self.bound}): the step runs at "
            f"{100 * self.floor / self.step:.0f} % of it"
        )
        return "\n".join([*lines, f"trace: {self.trace}"])


def profile_steps(trainer: Trainer, steps: int = 20) -> StepProfile:
    """Train `steps` steps twice, timed and then profiled, and write `profile/trace.json` in the run folder.

    The steps are the eager ones: a captured step has no parts. On a GPU a part's time is that of its kernels,
    and the backward's is what no other part has. The trainer's weights change; nothing else is written.

    Raises:
        ValueError: `steps` below 1.
    """
    if steps < 1:
        raise ValueError(f"profile: expected at least 1 step, got {steps}")
    trainer.model.train()
    _run(trainer, _WARMUP)
    started = time.perf_counter()
    _run(trainer, steps)
    step = (time.perf_counter() - started) / steps
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        items = _run(trainer, steps)
        seconds = time.perf_counter() - started
    rank = trainer.processes.rank
    trace = trainer.folder.path / "profile" / (f"trace-{rank}.json" if rank else "trace.json")
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    floor, bound = _floor(trainer, items / steps)
    return StepProfile(step, _shares(profiler, seconds, trainer.device), floor, bound, trace)


def _run(trainer: Trainer, steps: int) -> float:
    """Steps over as many epochs as they take; gives how many distinct items they encoded."""
    items, epoch, left = torch.zeros((), device=trainer.device), 1, steps
    while left:
        batches = iter(trainer.feed(epoch))
        while left:
            with span("data"):
                batch = next(batches, None)
            if batch is None:
                break
            item_ids, ahead = batch
            trainer.step(item_ids, ahead)
            left -= 1
            ordered = item_ids.flatten().sort().values
            items += (ordered[1:] != ordered[:-1]).sum() + (ordered[0] != 0)
        epoch += 1
    return float(items)  # on a GPU this also waits for the last step


def _shares(profiler: torch.profiler.profile, seconds: float, device: torch.device) -> dict[str, float]:
    events = profiler.key_averages()
    on_gpu = device.type == "cuda"
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        name = event.key.removeprefix("crossan_fast.")
        if name in parts and name != event.key:
            # A range appears once for the host and once for the device.
            spent = event.device_time_total if on_gpu else event.cpu_time_total
            parts[name] = max(parts[name], spent / 1e6)
    if on_gpu:
        cuda = torch.autograd.DeviceType.CUDA
        kernels = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
        # The backward's kernels are launched from autograd's thread, outside of any range of this one.
        rest = sum(spent for name, spent in parts.items() if name != "backward")
        parts["backward"] = max(0.0, sum(e.self_device_time_total for e in kernels) / 1e6 - rest)
    shares = {name: spent / seconds for name, spent in parts.items()}
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def _floor(trainer: Trainer, items: float) -> tuple[float, str]:
    """Two thin products a level, forward and twice backward; states read once for each direction."""
    config, cache = trainer.model.config, trainer.task.cache
    if config.loss == "full":
        items = trainer.task.split.num_items
    elif config.loss == "sampled":
        items = min(items + config.negatives, trainer.task.split.num_items)
    operations = 3 * sum(4 * config.bottleneck * tower.width * config.num_levels for tower in config.towers)
    size = torch.empty(0, dtype=cache.dtype).element_size()
    moved = 2 * sum(m.levels * m.width * size for m in config.modalities)
    precision = trainer.precision.name
    with computing_in(precision):
        rate, bandwidth = _ceilings(trainer.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    arithmetic, bytes_ = items * operations / rate, items * moved / bandwidth
    if arithmetic > bytes_:
        return arithmetic, f"{items:.0f} items' arithmetic at {rate / 1e12:.2f} TFLOP/s"
    return bytes_, f"{items:.0f} items' states at {bandwidth / 1e9:.0f} GB/s"


def _ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured FLOP/s of a square product, and bytes/s of a copy, read and write."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    source = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: a @ a, device)
    copy = _best(lambda: target.copy_(source), device)
    return 2 * 2048**3 / product, 2 * source.numel() / copy


def _best(function: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
