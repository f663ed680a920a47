"""What happens on the way of a training: calls at its steps, evaluations and epochs.

`TensorBoard` and `WeightsAndBiases` are two; `Trainer.fit(callbacks=[...])` takes others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crossan_fast._files import write_whole
from crossan_fast.training.result import Result

if TYPE_CHECKING:
    from crossan_fast.training.trainer import Trainer


@dataclass(frozen=True)
class StepEnd:
    """A step that was queued; reading one of its tensors waits for the device.

    Attributes:
        step: of the run, from 1.
        epoch: from 1.
        learning_rate: that the step was made with, `optimizer.learning_rate` times the warm-up's share.
        loss: `[]`, of several processes this one's part.
        gradient_norm: `[]`, of all gradients together, before they were clipped.
    """

    step: int
    epoch: int
    learning_rate: float
    loss: Tensor
    gradient_norm: Tensor


@dataclass(frozen=True)
class StepLog:
    """The numbers of a step, read from the device; see `StepEnd`. A step left out has a NaN or inf."""

    step: int
    epoch: int
    learning_rate: float
    loss: float
    gradient_norm: float


class Callback:
    """Does nothing at each event; a subclass overrides the ones that it wants, named as transformers' are.

    Of several processes the first one's are called; each must be given the same kinds. What a callback raises
    ends the training; `--resume` goes on behind the last epoch that was written.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.history` holds the epochs of before, where a run is resumed."""

    def on_step_end(self, trainer: Trainer, step: StepEnd) -> None:
        """After each step, which the device may not have finished."""

    def on_log(self, trainer: Trainer, steps: Sequence[StepLog]) -> None:
        """Every `log_every` steps and at an epoch's end: the steps since the last call, read in one go."""

    def on_evaluate(self, trainer: Trainer, epoch: int, result: Result) -> None:
        """After an epoch's validation."""

    def on_epoch_end(self, trainer: Trainer, entry: Mapping[str, Any]) -> None:
        """After an epoch's checkpoint was written; `entry` is its line of log.jsonl."""

    def on_train_end(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        """After the test; `results` is what results.json holds."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The training ends by an error, Ctrl-C among them, which is raised behind this call."""


class Callbacks:
    """Several as one; an event that none of them overrides costs nothing."""

    def __init__(self, callbacks: Sequence[Callback], *, speaks: bool) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks: expected instances of Callback, got {callback!r}")
        self.steps = speaks and _overridden(callbacks, "on_step_end")
        self.logs = _overridden(callbacks, "on_log")  # on every process: what is logged is summed over them
        self._callbacks = tuple(callbacks) if speaks else ()

    def call(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*arguments)

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Tell of an exception that leaves the block."""
        try:
            yield
        except BaseException as error:
            self.call("on_exception", trainer, error)
            raise


def _overridden(callbacks: Sequence[Callback], event: str) -> bool:
    return any(getattr(type(callback), event) is not getattr(Callback, event) for callback in callbacks)


class TensorBoard(Callback):
    """Event files in the run's folder: `step/…` of every step, `epoch/…` and `validation/…`, by step."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard: expected the package for tensorboard=true, it is not installed; "
                "pip install 'crossan-fast[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self._writer: Any = None

    def on_train_begin(self, trainer: Trainer) -> None:
        # Entries of an epoch that was cut off give way to those of its repetition.
        self._writer = self._make(str(trainer.folder.tensorboard), purge_step=trainer.step.steps + 1)

    def on_log(self, trainer: Trainer, steps: Sequence[StepLog]) -> None:
        for entry in steps:
            for name in ("loss", "gradient_norm", "learning_rate"):
                self._writer.add_scalar(f"step/{name}", getattr(entry, name), entry.step)

    def on_epoch_end(self, trainer: Trainer, entry: Mapping[str, Any]) -> None:
        for name, value in _epoch_values(entry).items():
            self._writer.add_scalar(name, value, trainer.step.steps)
        self._writer.flush()

    def on_train_end(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        self._writer.close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Callback):
    """A run of Weights & Biases, which a resumed run goes on with.

    Args:
        project: its name there.
        options: further arguments of `wandb.init`, such as `mode="offline"`.

    Raises:
        ImportError: the package `wandb` is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "wandb: expected the package for a run there, it is not installed; pip install wandb"
            ) from error
        self._make, self._options = wandb.init, {"project": project, **options}
        self._run: Any = None

    def on_train_begin(self, trainer: Trainer) -> None:
        kept = trainer.folder.path / "wandb-id.txt"
        held = kept.read_text(encoding="utf-8").strip() if trainer.history and kept.is_file() else None
        named = {"name": trainer.folder.path.name, "dir": str(trainer.folder.path)}
        again = {"id": held, "resume": "allow"} if held else {}
        self._run = self._make(**{**named, "config": trainer.config.to_dict(), **again, **self._options})
        write_whole(Path(kept), f"{self._run.id}\n")

    def on_log(self, trainer: Trainer, steps: Sequence[StepLog]) -> None:
        """The means of the steps, as one point."""
        values = {
            f"step/{name}": sum(getattr(entry, name) for entry in steps) / len(steps)
            for name in ("loss", "gradient_norm", "learning_rate")
        }
        self._run.log({**values, "epoch": steps[-1].epoch}, step=steps[-1].step)

    def on_epoch_end(self, trainer: Trainer, entry: Mapping[str, Any]) -> None:
        self._run.log(_epoch_values(entry), step=trainer.step.steps)

    def on_train_end(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        self._run.summary.update(
            {f"test/{name}": value for name, value in results["test"]["metrics"].items()}
            | {"test/protocol": results["test"]["protocol"], "best_epoch": results["best_epoch"]}
        )
        self._run.finish()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)


def _epoch_values(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's line of the log, by the names that dashboards group by."""
    own = ("loss", "gradient_norm", "learning_rate", "train_seconds", "evaluation_seconds")
    values = {f"epoch/{name}": float(entry[name]) for name in own if name in entry}
    return values | {f"validation/{name}": value for name, value in entry.get("validation", {}).items()}
