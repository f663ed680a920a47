"""The training loop: epochs over device-resident sequences, validation, early stopping, checkpoints."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from crossan_fast._sources import ReadAhead
from crossan_fast.serialization import digest_of_weights, record_training, save_model
from crossan_fast.training.batches import Batches
from crossan_fast.training.callbacks import (
    Callback,
    Callbacks,
    StepEnd,
    StepLog,
    TensorBoard,
    WeightsAndBiases,
)
from crossan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from crossan_fast.training.divergence import diverged, refuse_nothing_learned, warning
from crossan_fast.training.evaluation import check_cutoffs, fitting_cutoffs
from crossan_fast.training.feed import feed
from crossan_fast.training.graph import GraphedStep, refusal
from crossan_fast.training.malloc import keep_freed_memory
from crossan_fast.training.optimizer import make_optimizer
from crossan_fast.training.population import Population
from crossan_fast.training.precision import choose_precision
from crossan_fast.training.processes import Processes, join_processes
from crossan_fast.training.record import record_of
from crossan_fast.training.result import Part, Result
from crossan_fast.training.resuming import name_of_run, refuse_changes, refuse_others
from crossan_fast.training.run_folder import RunFolder, versions
from crossan_fast.training.starting import start
from crossan_fast.training.step import REMEDY, NotFinite, TrainingError, TrainStep
from crossan_fast.training.task import Task, open_task
from crossan_fast.training.train_config import TrainConfig

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model as a `TrainConfig` says.

    Args:
        config: the run.
        task: what `open_task(config)` gave, where it is at hand already.
        processes: what `join_processes` gave. Several train on the batches of one: `batch_size` is that of
            the joined batch; rank 0 alone writes and speaks. A run may go on with another number of them; its
            numbers then differ by dropout's draws, those of `loss="sampled"`, and rounding alone.

    Attributes:
        model: being trained; after `fit`, the weights of the best epoch.
        history: one entry an epoch, as in `log.jsonl`.
        config: with the precision that `auto` stands for here.
        precision: what is computed in, and why.
        monitor: the validation metric that picks the best epoch: `ndcg@10`, or of a tiny catalogue the NDCG
            at its largest cut-off.
        eager_because: why the step is not captured in CUDA graphs; None: it is.
    """

    def __init__(
        self, config: TrainConfig, task: Task | None = None, processes: Processes | None = None
    ) -> None:
        self.processes = processes or Processes()
        self.folder = RunFolder(config.path("run"))
        if task is None:
            held = self.folder.read_population()
            task = open_task(config, None if held is None else held.catalogue)
        self.task = task
        self.device = self.task.device
        began = self.folder.began_with()
        self.precision = choose_precision(config.precision, self.device, began)
        self.config = config = replace(config, precision=self.precision.name)
        self.monitor = f"ndcg@{self._cutoff()}"
        torch.manual_seed(config.seed)
        begun = start(config, self.task, self.folder)
        if config.init_from is not None:
            self.config = config = replace(config, freeze=begun.frozen)
        self._begun = begun.origin, begun.note
        self.model = begun.model.to(self.device)
        self.model.set_popularity(self.task.split)
        # Rows that the host has to gather are drawn on the host.
        on_host = self.device.type == "cuda" and self.task.cache.tier != "resident"
        sequences = self.task.split.train
        self.batches = Batches(
            sequences.cpu() if on_host else sequences,
            config.batch_size,
            config.seed,
            rank=self.processes.rank,
            size=self.processes.size,
        )
        _refuse_lonely(self.model.config.loss, self.batches)
        # What a target is told from in training, at most.
        self.columns = {
            "in_batch": config.batch_size * sequences.shape[1],
            "full": self.task.cache.num_items,
            "sampled": self.model.config.negatives + 1,
        }[self.model.config.loss]
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.step = TrainStep(
            self.model,
            self.task.cache,
            self.optimizer,
            config.optimizer,
            self.precision.name,
            self.processes.group,
        )
        self.eager_because = refusal(self.step)
        self._run = self.step if self.eager_because else GraphedStep(self.step)
        self.history: list[dict[str, Any]] = []
        self._best: dict[str, Any] = {"epoch": 0, self.monitor: -1.0}
        self._stale = 0
        # Of the whole run: one that goes on has it from its checkpoint.
        self._precision = {"name": self.precision.name, "reason": self.precision.reason}

    def fit(
        self,
        *,
        resume: bool = False,
        progress: bool = True,
        say: Callable[[str], None] = _logger.info,
        callbacks: Sequence[Callback] = (),
    ) -> dict[str, Any]:
        """Train, keep the best epoch, test it; gives what `results.json` holds.

        Args:
            resume: go on behind the last epoch that the run folder holds; from the start where it has none.
            progress: show a bar where the output is a terminal.
            say: called with a line on the precision, then one an epoch; by default they are logged.
            callbacks: besides those that the config asks for.

        Raises:
            FileExistsError: the folder holds a run and `resume` is off.
            ValueError: the folder's run was made with another config, or of other items or users.
            TrainingError: a loss or gradient is not finite, or no batch has a negative.

        Warns:
            RuntimeWarning: the last epoch's loss is worse than that of a model that knows nothing, which
                `results.json` has as `diverged` (see `crossan_fast.training.divergence`).
        """
        asked: list[Callback] = [TensorBoard()] if self.config.tensorboard else []
        if self.config.wandb is not None:
            asked.append(WeightsAndBiases(self.config.wandb))
        self._callbacks = Callbacks([*asked, *callbacks], speaks=self.processes.first)
        if not self.processes.first:
            return self._fit(resume, False, lambda line: None)
        with self.folder.writing(), self._callbacks.watching(self):
            return self._fit(resume, progress, say)

    def _fit(self, resume: bool, progress: bool, say: Callable[[str], None]) -> dict[str, Any]:
        self._begin(resume, say)
        self._callbacks.call("on_train_begin", self)
        stopped = "epochs"
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            if self.config.patience is not None and self._stale >= self.config.patience:
                stopped = "patience"
                break
            entry = self._epoch(epoch, progress)
            self.history.append(entry)
            self._keep(entry)
            self._callbacks.call("on_epoch_end", self, entry)
            say(_line(entry, self.config.epochs, self.monitor))
            if diverged(self.history, self.columns):
                say(f"warning: {warning(self.history, self.columns)}")
        results = self._finish(stopped)
        self._callbacks.call("on_train_end", self, results)
        return results

    def evaluate(self, part: Part) -> Result:
        """Rank the held-out targets with the model as it is, under the config's protocol."""
        result = self.task.evaluate(self.model, part, self.config.evaluation, processes=self.processes)
        return result.noting(self._begun[1])

    def _cutoff(self) -> int:
        """The largest of 1 to 10 that cuts the candidates; with a warning where the config's reach beyond."""
        total = self.task.num_candidates(self.config.evaluation)
        fitted = fitting_cutoffs(self.config.evaluation.k, total)
        check_cutoffs(fitted, total)  # now, not after the first epoch
        if beyond := [k for k in self.config.evaluation.k if k not in fitted]:
            warnings.warn(
                f"evaluation.k: expected cut-offs below the {total} candidates, got {beyond}; "
                f"{total - 1} stands for them",
                stacklevel=3,
            )
        return min(10, total - 1)

    def feed(self, epoch: int) -> Iterator[tuple[torch.Tensor, ReadAhead]]:
        """The batches of an epoch, 1, 2, …; see `crossan_fast.training.feed`."""
        alone = self.processes.size == 1
        backend = self.model.backend_for("deduplicate", torch.device("cpu"))
        # Other losses read items that their batch does not name.
        gather = self.model.config.loss == "in_batch"
        batches, cache = self.batches, self.task.cache
        return feed(batches, epoch, cache, self.device, slots=alone, gather=gather, backend=backend)

    def _begin(self, resume: bool, say: Callable[[str], None]) -> None:
        held = self.folder.last.exists()
        if held and not resume:
            raise FileExistsError(
                f"run: {self.folder.path} holds a run; pass --resume to go on with it, or another run=FOLDER"
            )
        say(f"precision: {self.precision}")
        if self._begun[1]:
            say(f"warning: {self._begun[1]}")
        population = self.folder.read_population()
        if held:
            refuse_changes(self._stated(self.folder.read_config()), self._stated(self.config))
            refuse_others(population, self.task, self.model.config.modality_names)
            state = load_checkpoint(
                self.folder.last,
                self.model,
                self.optimizer,
                self.step.average,
                population.run if population else "",
            )
            self._take_up(state)
            if self.processes.first:
                self.folder.write_log(self.history)
            say(f"{self.folder.path}: goes on behind epoch {len(self.history)}")
            new = self.task.cache.num_items - self.task.split.num_items
            if new:
                say(f"{new:,} items of the cache came after the run began and take no part in it")
        # Every process reads the folder before the first one writes to it.
        self.processes.wait()
        fresh = population is None
        if population is None:
            origin, note = self._begun
            population = replace(Population.of(self.task), origin=origin, note=note)
            population = replace(population, run=name_of_run(self._stated(self.config), population))
        self._population, self._run_id = population, population.run
        if self.processes.first:
            self.folder.write_config(self.config, self._run_id)
            if fresh:
                population.write(self.folder.population)

    def _take_up(self, state: dict[str, Any]) -> None:
        """A checkpoint's progress."""
        kinds = {"history": list, "best": dict, "stale": int, "steps": int, "precision": dict}
        state.setdefault("precision", self._precision)  # checkpoints of before have none
        for entry, kind in kinds.items():
            if not isinstance(state.get(entry), kind):
                raise ValueError(
                    f"checkpoint: {self.folder.last}: expected {entry} as a {kind.__name__} in its progress, "
                    f"got {state.get(entry)!r}"
                )
        self.history, self._best, self._stale = state["history"], state["best"], state["stale"]
        self.step.steps = state["steps"]
        self._precision = state["precision"]
        self.step.skipped.fill_(self._skipped())

    def _stated(self, config: TrainConfig) -> TrainConfig:
        """With the modalities that None stands for here, so that stating them is no change."""
        return replace(config, modalities=config.crossan_config(self.task.cache).modality_names)

    def _epoch(self, epoch: int, progress: bool) -> dict[str, Any]:
        self.model.train()
        self.processes.seed_epoch(self.config.seed, epoch)
        started = time.perf_counter()
        losses, norms = self._steps(epoch, progress).unbind(1)
        trained = time.perf_counter()
        skipped = int(self.step.skipped) - self._skipped()
        counted = self._counted(losses, skipped, epoch)
        refuse_nothing_learned(counted, epoch)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "loss": float(counted.double().mean()),
            "gradient_norm": float(norms[norms.isfinite()].double().mean()),
            "learning_rate": self.step.learning_rate,
            "train_seconds": trained - started,
        }
        if skipped:
            entry["skipped"] = skipped
        if epoch == 1:
            entry["first_loss"] = float(counted[0])
        if epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs:
            with self.step.averaged():
                result = self.evaluate("validation")
            entry["validation"] = result.metrics
            entry["evaluation_seconds"] = time.perf_counter() - trained
            self._callbacks.call("on_evaluate", self, epoch, result)
        return entry

    def _steps(self, epoch: int, progress: bool) -> torch.Tensor:
        """Train an epoch; gives each step's loss and gradient norm, `[steps, 2]` on the host."""
        steps = len(self.batches)
        # They stay on the device until they are logged: reading one would make every step wait.
        kind = torch.promote_types(self.step.gradient_norm.dtype, torch.float32)
        values = torch.zeros(steps, 2, device=self.device, dtype=kind)
        rates: list[float] = []
        bar = tqdm(
            self.feed(epoch),
            total=steps,
            desc=f"epoch {epoch}/{self.config.epochs}",
            unit="step",
            leave=False,
            disable=None if progress else True,
        )
        logged = index = 0
        try:
            for index, (item_ids, ahead) in enumerate(bar, start=1):
                loss = self._run(item_ids, ahead)
                row = torch.stack((loss, self.step.gradient_norm), out=values[index - 1])
                rates.append(self.step.learning_rate)
                if self._callbacks.steps:
                    end = StepEnd(self.step.steps, epoch, rates[-1], row[0], row[1])
                    self._callbacks.call("on_step_end", self, end)
                if self._callbacks.logs and (self.step.steps % self.config.log_every == 0 or index == steps):
                    self._log(epoch, values[logged:index], rates[logged:])
                    logged = index
        except NotFinite as error:
            raise self._stop(error.what, error.value, index, epoch, error.first) from None
        return self._joined(values)

    def _joined(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the processes, on the host."""
        return (self.processes.sum(values.clone()) / self.processes.size).cpu()

    def _log(self, epoch: int, values: torch.Tensor, rates: list[float]) -> None:
        first = self.step.steps - len(rates) + 1
        rows = enumerate(zip(rates, self._joined(values).tolist(), strict=True), start=first)
        self._callbacks.call("on_log", self, [StepLog(n, epoch, rate, *row) for n, (rate, row) in rows])

    def _counted(self, losses: torch.Tensor, skipped: int, epoch: int) -> torch.Tensor:
        """An epoch's losses but those of steps left out, which are not finite; others stop the run."""
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        unsound, most, before = int(self.step.unsound), self.config.optimizer.skip_nonfinite, self._skipped()
        first = self.step.first_bad_gradient() if unsound or skipped else ""
        if before + skipped > most or (skipped and len(bad) == len(losses)):
            named = f" ({first} in the last)" if first else ""
            raise TrainingError(
                f"loss, gradient: not finite at {skipped} of the {len(losses)} steps of epoch {epoch} and "
                f"{before} before it{named}; optimizer.skip_nonfinite={most} may be, not all of an epoch; "
                f"{REMEDY}"
            )
        # A step's gradient spoils the losses behind it.
        if unsound and not (bad and bad[0] <= len(losses) - unsound):
            raise self._stop("gradient", float("nan"), len(losses) + 1 - unsound, epoch, first)
        if len(bad) > skipped:
            raise self._stop("loss", float(losses[bad[0]]), bad[0] + 1, epoch, first)
        return losses[losses.isfinite()]

    def _skipped(self) -> int:
        """Steps of the epochs so far that were left out."""
        return sum(entry.get("skipped", 0) for entry in self.history)

    def _stop(self, what: str, value: float, step: int, epoch: int, first: str = "") -> TrainingError:
        kept = f"; {self.folder.last} is of the epoch before" if self.history else ""
        if skipped := int(self.step.skipped):
            kept += f"; {skipped} such steps were left out, at most optimizer.skip_nonfinite may be"
        bad = f" ({first})" if first else ""
        return TrainingError(f"{what}: {value} at step {step} of epoch {epoch}{bad}; {REMEDY}{kept}")

    def _keep(self, entry: dict[str, Any]) -> None:
        """Write the best epoch first: a run cut off between the two files repeats the epoch and agrees."""
        if metrics := entry.get("validation"):
            if metrics[self.monitor] > self._best[self.monitor]:
                self._best = {"epoch": entry["epoch"], self.monitor: metrics[self.monitor]}
                self._stale = 0
                # The first process's alone: on unlike devices those of others may differ in a last bit.
                if self.processes.first:
                    with self.step.averaged():
                        self._best["weights"] = digest_of_weights(self.model)
                        save_model(self.model, self.folder.best, self._run_id)
            else:
                self._stale += 1
        entry["best_epoch"] = self._best["epoch"]
        if not self.processes.first:
            return
        progress = {"history": self.history, "best": self._best, "stale": self._stale}
        progress |= {"steps": self.step.steps, "precision": self._precision}
        save_checkpoint(
            self.folder.last, self.model, self.optimizer, progress, self.step.average, self._run_id
        )
        self.folder.write_log(self.history)

    def _finish(self, stopped: str) -> dict[str, Any]:
        self.processes.wait()
        best = self.folder.load_best(self._best, backend=self.config.backend)
        self.model.load_state_dict(best.state_dict())
        results = {
            "best_epoch": self._best["epoch"],
            "epochs": len(self.history),
            "stopped_by": stopped,
            "diverged": diverged(self.history, self.columns),
            "skipped_steps": self._skipped(),
            "train_seconds": sum(entry["train_seconds"] for entry in self.history),
            "precision": self._precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "validation": self.evaluate("validation").to_dict(),
            "test": self.evaluate("test").to_dict(),
            "versions": versions(self.device),
        }
        if self.processes.first:
            self.folder.write_results(results)
            record_training(self.folder.best, record_of(self.task, self.config, results, self._population))
            if results["diverged"]:
                warnings.warn(warning(self.history, self.columns), RuntimeWarning, stacklevel=3)
        return results


@contextmanager
def open_trainer(config: TrainConfig) -> Iterator[Trainer]:
    """`Trainer(config)`; under `torchrun` with its processes, which part at the end of the block.

    On a CPU it changes this process's malloc for good: freed memory stays with the process, see
    `crossan_fast.training.malloc.keep_freed_memory`. `Trainer` by itself does not.
    """
    with join_processes(config.device) as processes:
        trainer = Trainer(config, processes=processes)
        if trainer.device.type == "cpu":
            keep_freed_memory()
        yield trainer


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """`Trainer(config).fit(...)` as `crossan-fast train` runs it: see `open_trainer`, also for malloc."""
    with open_trainer(config) as trainer:
        return trainer.fit(resume=resume, progress=progress)


def _refuse_lonely(loss: str, batches: Batches) -> None:
    if loss != "in_batch":
        return
    expected = "expected at least 2 for loss 'in_batch', whose negatives are other users' items"
    if batches.batch_size < 2:
        raise ValueError(f"batch_size: {expected}, got {batches.batch_size}")
    if batches.rows < 2:
        raise ValueError(f"users: {expected}, got {batches.rows} with two training items or more")


def _line(entry: dict[str, Any], epochs: int, monitor: str) -> str:
    text = f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.4f}, {entry['train_seconds']:.1f} s"
    if skipped := entry.get("skipped"):
        text += f", {skipped} steps left out (not finite)"
    if metrics := entry.get("validation"):
        best = " (best)" if entry["best_epoch"] == entry["epoch"] else ""
        hits = monitor.replace("ndcg", "hr")
        text += f", validation {hits.upper()} {100 * metrics[hits]:.2f} %"
        text += f" {monitor.upper()} {100 * metrics[monitor]:.2f} %{best}"
    return text
