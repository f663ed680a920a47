"""A method's training to its best validation epoch; one that was interrupted goes on where it was."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.methods import Method
from benchmarks.study.worlds import World
from crossan_fast._digests import load_tensors, save_tensors
from crossan_fast._files import write_whole
from crossan_fast.model import CrossanModel
from crossan_fast.training import TrainStep, evaluate
from crossan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from crossan_fast.training.train_config import FilterHistory

# The split's targets are ranked among all items, histories included, as MISSRec does on the 5-core data.
FILTER: FilterHistory = "none"
EVALUATE_EVERY, PATIENCE = 2, 3
# The files of a training's folder, both as of an evaluation at the end of an epoch.
LAST, BEST = "last.safetensors", "best.safetensors"

Feed = Callable[[int], Iterable[tuple[Any, ...]]]


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        steps: of the optimizer.
        best: validation NDCG@10 of `best_epoch`, whose weights the file `BEST` has.
        stale: evaluations since then.
        seconds: of training, evaluation left out.
    """

    epoch: int = 0
    steps: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    seconds: float = 0.0

    def ended(self, most: int) -> bool:
        """Whether `most` steps were made, or validation has not gained for long enough."""
        return self.steps >= most or self.stale >= PATIENCE


def folder_of(method: Method, world: World, seed: int) -> Path:
    """Where a training's state lies."""
    return world.folder / "learned" / f"{method.name}-{seed}-{world.size.precision}"


def learn(step: TrainStep, world: World, fed: Feed, an_epoch: int, most: int, folder: Path) -> Progress:
    """Train for `most` steps, or fewer where `PATIENCE` evaluations brought no gain; put in the best weights.

    A training that `folder` has begun goes on; one that has come to its end there is taken as it is.

    Args:
        fed: the batches of the epoch with this number, as `step` takes them; `an_epoch` of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _begun(step, folder, most)
    epochs = math.ceil(most / an_epoch)
    while not done.ended(most):
        begun, losses = time.perf_counter(), []
        done.epoch += 1
        for arguments in fed(done.epoch):
            losses.append(step(*arguments))
            if step.steps >= most:
                break
        float(torch.stack(losses).mean())  # a GPU has to be waited for
        done.steps, done.seconds = step.steps, done.seconds + time.perf_counter() - begun
        if done.epoch % EVALUATE_EVERY == 0 or done.epoch >= epochs:
            _judge(step, world, done, folder)
            if done.steps == done.epoch * an_epoch:  # no part of an epoch can be gone on from
                save_checkpoint(folder / LAST, step.model, step.optimizer, asdict(done))
    step.model.load_state_dict(load_tensors(folder / BEST, "weights")[0], strict=False)
    return done


def metrics(model: CrossanModel, world: World, part: Any) -> dict[str, float]:
    """HR@10 and NDCG@10."""
    return evaluate(model, world.cache, world.split, part, k=(10,), filter_history=FILTER).metrics


def _begun(step: TrainStep, folder: Path, most: int) -> Progress:
    """What is in `folder`, put into model and optimizer."""
    if not (folder / LAST).is_file():
        return Progress()
    found = Progress(**load_checkpoint(folder / LAST, step.model, step.optimizer))
    step.steps = found.steps
    goes_on = "is taken as it is" if found.ended(most) else "goes on"
    _say(f"{folder}: a training of {found.epoch} epochs {goes_on}; without that folder it begins anew")
    return found


def _judge(step: TrainStep, world: World, done: Progress, folder: Path) -> None:
    """Evaluate; keep the weights where they are the best so far."""
    found = metrics(step.model, world, "validation")["ndcg@10"]
    _say(f"epoch {done.epoch}, {done.seconds:.0f} s: validation NDCG@10 {found:.5f}")
    done.stale += 1
    if found > done.best:
        done.best, done.best_epoch, done.stale = found, done.epoch, 0
        trained = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
        plain = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
        write_whole(folder / BEST, save_tensors(plain, {}))


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
