"""SASRec by ids trained beside a run, for `crossan-fast evaluate --baselines sasrec`.

On the run's own training sequences and batches, with its window, width, blocks, loss and optimizer, chosen by
its validation targets under its protocol. The learning rate is chosen there, too: one that suits states may
be far from one that suits ids, and a baseline that was not tuned says nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from crossan_fast._checks import check_integer, one_or_several
from crossan_fast._sources import ReadAhead
from crossan_fast.config import CrossanConfig
from crossan_fast.sasrec import SasRec, by_ids
from crossan_fast.training.batches import Batches
from crossan_fast.training.optimizer import DecayTooLarge, make_optimizer
from crossan_fast.training.precision import choose_precision
from crossan_fast.training.step import REMEDY, TrainingError, TrainStep
from crossan_fast.training.task import Task
from crossan_fast.training.train_config import OptimizerConfig, TrainConfig

_logger = logging.getLogger(__name__)

# Ids start from nothing, and may need more epochs than a run over states: early stopping should end them.
EPOCHS, PATIENCE = 100, 5
# Of the optimizer, in what it was trained with, at their defaults, too.
_ALWAYS = ("learning_rate", "weight_decay", "id_weight_decay")


@dataclass(frozen=True)
class TrainedSasRec:
    """Attributes:
    model: in evaluation mode, with the weights of the best epoch.
    epochs: trained; at most `most`.
    most: epochs that there might have been.
    patience: evaluations without a better validation metric after which training stops.
    stopped_by: `patience`, or `epochs`: with more of them it might have become better.
    best_epoch: whose weights these are.
    validation: the best epoch's metric of that name, a share: `{"ndcg@10": 0.04}`.
    seconds: of training and validation, with every learning rate.
    parameters: that were trained.
    settings: of the config, what the model is and what it was trained with.
    tried: the best validation metric with each learning rate, of which `settings` has the best; None where
        that training failed.
    """

    model: SasRec
    epochs: int
    most: int
    patience: int
    stopped_by: Literal["patience", "epochs"]
    best_epoch: int
    validation: dict[str, float]
    seconds: float
    parameters: int
    settings: dict[str, Any]
    tried: dict[float, float | None]

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as plain values."""
        names = [name for name in self.__dataclass_fields__ if name != "model"]
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        (monitor, value), more = next(iter(self.validation.items())), ""
        if self.stopped_by == "epochs":
            more = ", its limit: more epochs might have done better"
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        others = [
            f"; with learning_rate {rate:g} {'it failed' if reached is None else f'{100 * reached:.2f} %'}"
            for rate, reached in self.tried.items()
            if rate != self.settings["learning_rate"]
        ]
        return (
            f"{self.parameters:,} parameters, best epoch {self.best_epoch} of {self.epochs}{more}, "
            f"validation {monitor.upper()} {100 * value:.2f} %, {self.seconds:.1f} s; {settings}"
            + "".join(others)
        )


def train_sasrec(
    config: TrainConfig,
    task: Task,
    *,
    epochs: int = EPOCHS,
    patience: int | None = None,
    seed: int | None = None,
    learning_rates: float | Sequence[float] | None = None,
    say: Callable[[str], None] = _logger.info,
) -> TrainedSasRec:
    """Train SASRec by ids on what a run was trained on.

    Args:
        config: of the run. Its window, `embedding_dim`, blocks, heads, dropout, loss, scores, batch size and
            optimizer and precision hold, but for the factors of side network and fusion, which aren't there.
        task: what `open_task` gave for the run's config.
        epochs: at most so many.
        patience: evaluations without a better validation metric before it stops; None: the run's, or 5 where
            that has none.
        seed: of weights, batches and dropout; None: the run's. torch's own generators are as before.
        learning_rates: one or several, a training with each, of which the best on validation is kept; None:
            the run's, and a third of it.
        say: called with what begins, what it will take, and what came of it.

    Raises:
        TrainingError: a loss or gradient is not finite, with every learning rate.
        TypeError: a learning rate that is no number.
        ValueError: the run's precision is `tf32`, on a device without it; no learning rate, or a wrong one;
            all of them too large for `optimizer.id_weight_decay`, which a run without ids has by default.
    """
    check_integer("epochs", epochs, 1)
    optimizers = _with_each(config.optimizer, learning_rates)
    patience = config.patience or PATIENCE if patience is None else patience
    check_integer("patience", patience, 1)
    config = replace(config, epochs=epochs, patience=patience, seed=config.seed if seed is None else seed)
    devices = [task.device] if task.device.type == "cuda" else []
    best: TrainedSasRec | None = None
    tried: dict[float, float | None] = {}
    seconds = 0.0
    for number, optimizer in enumerate(optimizers, 1):
        of = "" if len(optimizers) == 1 else f" ({number} of {len(optimizers)})"
        one, begun = replace(config, optimizer=optimizer), time.perf_counter()
        tried[optimizer.learning_rate] = None
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(config.seed)
                trained = _Training(one, task, say, of).run()
        except (TrainingError, DecayTooLarge) as error:
            if best is None and number == len(optimizers):
                raise
            say(f"{error}; this learning rate is left out")
        else:
            tried[optimizer.learning_rate] = reached = max(trained.validation.values())
            if best is None or reached > max(best.validation.values()):
                best = trained
        seconds += time.perf_counter() - begun
    assert best is not None
    return replace(best, tried=tried, seconds=seconds)


def _with_each(config: OptimizerConfig, rates: float | Sequence[float] | None) -> list[OptimizerConfig]:
    """The optimizer with each learning rate: see `train_sasrec`."""
    own = config.learning_rate
    if rates is None:
        rates = (own, own / 3)
    several = one_or_several(rates)
    for rate in several:
        if isinstance(rate, bool) or not isinstance(rate, Real):
            raise TypeError(f"learning_rates: expected a number or a list of numbers, got {rate!r}")
    distinct = dict.fromkeys(map(float, several))
    if not distinct:
        raise ValueError("learning_rates: expected at least one, got none")
    return [replace(config, learning_rate=rate) for rate in distinct]


class _Training:
    """One training: what `train_sasrec` keeps between epochs."""

    def __init__(self, config: TrainConfig, task: Task, say: Callable[[str], None], of: str = "") -> None:
        self.config, self.task, self.say, self.name = config, task, say, f"SASRec by ids{of}"
        model_config = by_ids(config.crossan_config(task.cache))
        self.model = SasRec(model_config, task.cache.num_items, config.backend).to(task.device)
        self.model.set_popularity(task.split)
        self.batches = Batches(task.split.train, config.batch_size, config.seed)
        self.precision = choose_precision(config.precision, task.device).name
        settings = replace(config.optimizer, side_network=1.0, fusion=1.0, skip_nonfinite=0)
        optimizer = make_optimizer(self.model, settings)
        self.step = TrainStep(self.model, task.cache, optimizer, settings, self.precision)
        self.monitor = f"ndcg@{min(10, task.num_candidates(config.evaluation) - 1)}"

    def run(self) -> TrainedSasRec:
        most, patience = self.config.epochs, self.config.patience or PATIENCE
        self._announce()
        begun = time.perf_counter()
        best, best_epoch, stale, epoch = -1.0, 0, 0, 0
        kept: dict[str, Tensor] = {}
        while epoch < most and stale < patience:
            epoch += 1
            self._epoch(epoch)
            if epoch % self.config.evaluate_every == 0 or epoch == most:
                with self.step.averaged():
                    found = self._validate()
                    stale = 0 if found > best else stale + 1
                    if found > best:
                        best, best_epoch = found, epoch
                        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
            if epoch == 1:
                first = time.perf_counter() - begun
                self.say(f"{self.name}: an epoch takes {first:.1f} s, all {most} would {most * first:.0f} s")
        self.model.load_state_dict(kept)
        trained = TrainedSasRec(
            self.model.eval(),
            epoch,
            most,
            patience,
            "patience" if stale >= patience else "epochs",
            best_epoch,
            {self.monitor: best},
            time.perf_counter() - begun,
            sum(p.numel() for p in self.model.parameters()),
            self._settings(),
            {self.config.optimizer.learning_rate: best},
        )
        self.say(f"{self.name}: {epoch} epochs, {trained.seconds:.1f} s, the best was epoch {best_epoch}")
        return trained

    def _announce(self) -> None:
        config, width = self.config, self.model.config.embedding_dim
        self.say(
            f"{self.name}: trains vectors of {width} numbers for {self.task.split.num_items:,} items "
            f"on the run's {self.batches.rows:,} training sequences, for at most {config.epochs} epochs of "
            f"{len(self.batches)} steps, until {config.patience} evaluations bring no better validation "
            f"{self.monitor.upper()}; learning_rate {config.optimizer.learning_rate:g}, seed {config.seed}"
        )

    def _epoch(self, number: int) -> None:
        self.model.train()
        losses = []
        counts = self.batches.distinct(number)
        # On a GPU no slot more than there are items; a CPU makes as many as there are anyway.
        for ids, count in zip(self.batches.epoch(number), counts, strict=True):
            losses.append(self.step(ids, ReadAhead(capacity=count)))
        loss = float(torch.stack(losses).mean())  # a GPU is waited for
        if loss != loss or int(self.step.unsound):
            raise TrainingError(f"{self.name}: loss {loss} or a gradient in epoch {number}; {REMEDY}")

    def _validate(self) -> float:
        result = self.task.evaluate(self.model, "validation", self.config.evaluation)
        return result.metrics[self.monitor]

    def _settings(self) -> dict[str, Any]:
        model, config = self.model.config, self.config
        names = ["embedding_dim", "window", "blocks", "attention_heads", "dropout", "loss", "targets"]
        names += ["negatives", "negative_sampling"] if model.loss == "sampled" else []
        stride = {} if config.split.stride is None else {"stride": config.split.stride}
        return {
            **{name: getattr(model, name) for name in (*names, "scores")},
            **_changed(model, "temperature", "label_smoothing"),
            "batch_size": config.batch_size,
            **stride,
            **{name: getattr(config.optimizer, name) for name in _ALWAYS},
            **_changed(
                config.optimizer, "sequence_encoder", "betas", "eps", "warmup_steps", "clip_norm", "average"
            ),
            "precision": self.precision,
            "seed": config.seed,
        }


def _changed(config: CrossanConfig | OptimizerConfig, *names: str) -> dict[str, Any]:
    """Fields that are not their defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return {name: value for name in names if (value := getattr(config, name)) != defaults[name]}
