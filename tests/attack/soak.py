"""A process that goes on and on: its memory, open files and threads must not grow with what it has done.

    python soak.py STEPS OPENINGS FOLDER

Prints its tallies as they are after each tenth of the work, one a line, so that what was done is known of a
process that is ended early; how it goes, it says on the error stream.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import kill_points
import torch
from hostile_files import small_model
from tally import Tally

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache
from crossan_fast.training import OptimizerConfig, make_optimizer
from crossan_fast.training.checkpoint import load_weights, save_checkpoint
from crossan_fast.training.step import TrainStep

# What the allocator and torch's caches may still take once a tenth of the work is done, in bytes.
SLACK = 8 << 20


def held() -> tuple[int, int, int]:
    """Bytes of memory, open files and threads of this process; OSError where there is no /proc."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watched(
    what: str, times: int, work: Callable[[int], None], tell: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """`work` so many times; lost are the tenths, from the second on, in which the process came to hold more.

    Memory is compared with what was held after the first tenth, which fills caches. `tell` hears of each.
    """
    tally, before = Tally(what), (0, 0, 0)
    for tenth in range(10):
        for index in range(times * tenth // 10, times * (tenth + 1) // 10):
            work(index)
            tally.tried += 1
        now = held()
        say(f"{what}: {tally.tried:,}: {now[0] / 1e6:.1f} MB, {now[1]} files, {now[2]} threads")
        if tenth == 0:
            before = now
        elif now[0] > before[0] + SLACK or now[1:] != before[1:]:
            tally.lost["grew"] += 1
            tally.examples.setdefault("grew", f"after {tally.tried}: {before} → {now}")
        tell(tally)
    return tally


def attack(steps: int, openings: int, work: Path, tell: Callable[[Tally], None]) -> None:
    """`steps` training steps of a tiny model, then each kind of file opened and saved `openings` times."""
    torch.manual_seed(0)
    kill_points.one_run(work)
    cache = HiddenStateCache.open(work / "c")
    config = CrossanConfig(tuple(cache.modalities), embedding_dim=4, bottleneck=2, window=3, blocks=1)
    model = CrossanModel(config)
    model.set_popularity(torch.ones(cache.num_items + 1))
    settings = OptimizerConfig()
    optimizer = make_optimizer(model, settings)
    step = TrainStep(model, cache, optimizer, settings)
    batch = torch.tensor([[0, 1, 5, 9], [2, 6, 10, 3], [0, 4, 8, 12]])

    def one_step(index: int) -> None:
        step(batch.roll(index % 3, 0))

    small = small_model()
    small_optimizer = make_optimizer(small, settings)

    def open_and_save(index: int) -> None:
        opened = HiddenStateCache.open(work / "c")
        opened.gather(torch.arange(opened.num_items + 1))
        small.save_pretrained(work / "m")
        CrossanModel.from_pretrained(work / "m", backend="eager")
        save_checkpoint(work / "last.safetensors", small, small_optimizer, {"index": index})
        load_weights(work / "last.safetensors", backend="eager")

    watched("training steps in one process", steps, one_step, tell)
    watched("openings and savings in one process", openings, open_and_save, tell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    attack(
        int(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        lambda tally: print(tally.to_json(), flush=True),
    )
