"""A method's training to its best validation epoch; one that was interrupted goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
# The files of a training's folder: the state of the last evaluation at the end of an epoch, and the weights
# of the best one so far, by its epoch, so that one that is killed between two writes has both.
LAST, BEST = "last.safetensors", "best-{}.safetensors"

Feed = Callable[[int], Iterable[tuple[Any, ...]]]


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        steps: of the optimizer.
        best: validation NDCG@10 of `best_epoch`, whose weights its file `BEST` has.
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


@dataclass
class Learning:
    """A training of at most so many steps, whose state lies in a folder.

    Args:
        settings: JSON values of what its numbers depend on; a folder that was begun under others is refused.
        fed: the batches of the epoch with this number, as `step` takes them; `an_epoch` of them.
        most: steps; fewer are made where `PATIENCE` evaluations bring no gain.
    """

    step: TrainStep
    world: World
    settings: dict[str, Any]
    fed: Feed
    an_epoch: int
    most: int
    folder: Path
    done: Progress = field(default_factory=Progress)
    _best: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> Progress:
        """Train, and put the best weights into the model.

        A training that the folder has begun goes on; one that has come to its end there is taken as it is.

        Raises:
            ValueError: the folder was begun under other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / LAST).is_file():
            self._take_up()
        done, step = self.done, self.step
        while not done.ended(self.most):
            begun, losses = time.perf_counter(), []
            done.epoch += 1
            for arguments in self.fed(done.epoch):
                losses.append(step(*arguments))
                if step.steps >= self.most:
                    break
            float(torch.stack(losses).mean())  # a GPU has to be waited for
            done.steps, done.seconds = step.steps, done.seconds + time.perf_counter() - begun
            if done.epoch % EVALUATE_EVERY == 0 or done.steps >= self.most:
                self._judge()
        step.model.load_state_dict(self._best, strict=False)
        return done

    def _take_up(self) -> None:
        """Model, optimizer, progress and best weights as the folder has them."""
        found = load_checkpoint(self.folder / LAST, self.step.model, self.step.optimizer)
        wanted = json.loads(json.dumps(self.settings))
        if (settings := found.pop("settings", None)) != wanted:
            raise ValueError(
                f"{self.folder}: expected a training under {wanted}, got {settings}; without that folder it "
                "begins anew"
            )
        self.done = Progress(**found)
        self.step.steps = self.done.steps
        self._best = load_tensors(self._best_file, "weights")[0]
        goes_on = "is taken as it is" if self.done.ended(self.most) else "goes on"
        _say(f"{self.folder}: a training of {self.done.epoch} epochs {goes_on}; without it it begins anew")

    def _judge(self) -> None:
        """Evaluate, and keep the weights where they are the best so far.

        On disk at the end of an epoch alone: nothing goes on from a part of one.
        """
        done, model = self.done, self.step.model
        whole = done.steps == done.epoch * self.an_epoch
        found = metrics(model, self.world, "validation")["ndcg@10"]
        _say(f"epoch {done.epoch}, {done.seconds:.0f} s: validation NDCG@10 {found:.5f}")
        done.stale += 1
        if found > done.best:
            done.best, done.best_epoch, done.stale = found, done.epoch, 0
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._best = {name: p.detach().cpu().clone().contiguous() for name, p in trained.items()}
            if whole:
                write_whole(self._best_file, save_tensors(self._best, {}))
        if whole:
            progress = {**asdict(done), "settings": self.settings}
            save_checkpoint(self.folder / LAST, model, self.step.optimizer, progress)
            for old in set(self.folder.glob(BEST.format("*"))) - {self._best_file}:
                old.unlink()

    @property
    def _best_file(self) -> Path:
        return self.folder / BEST.format(self.done.best_epoch)


def metrics(model: CrossanModel, world: World, part: Any) -> dict[str, float]:
    """HR@10 and NDCG@10."""
    return evaluate(model, world.cache, world.split, part, k=(10,), filter_history=FILTER).metrics


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
