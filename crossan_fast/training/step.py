"""One optimizer step: loss, gradients, clipping, AdamW. It reads nothing back from the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossan_fast._profiling import span
from crossan_fast._sources import ReadAhead
from crossan_fast.cache import HiddenStateCache
from crossan_fast.model import CrossanModel
from crossan_fast.training.averaging import WeightAverage
from crossan_fast.training.optimizer import clip_gradients, set_learning_rate
from crossan_fast.training.precision import computing_in
from crossan_fast.training.train_config import ComputePrecision, OptimizerConfig

REMEDY = "a smaller optimizer.learning_rate or optimizer.clip_norm, or more optimizer.warmup_steps, may help"
NOTHING_AHEAD = ReadAhead()


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what to change."""


class NotFinite(TrainingError):
    """A step's loss or gradient is NaN or inf.

    Attributes:
        what: `loss`, or `gradient` for the norm of all gradients together.
        value: what it is.
    """

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"{what}: {value} at step {step}; {REMEDY}")
        self.what, self.value = what, value


class TrainStep:
    """Callable on item ids `[B, S + 1]`; gives the loss, detached, on the device.

    Args:
        model: in training mode.
        cache: the model's states, read by id.
        optimizer: of `make_optimizer`.
        config: warm-up, clipping and averaging.
        precision: `bf16` runs forward and backward under autocast, `tf32` with TF32 products.
        group: of several processes, each with a part of the batch: losses are then parts of the joined
            batch's (their mean is its loss), and every process has its gradients.

    On the CPU a loss or gradient that is not finite raises `NotFinite`; the weights stay those of the step
    before. A GPU is not waited for: `unsound` counts there, and the weights are lost.

    Attributes:
        unsound: int64 `[]` on the device: steps from the first on whose gradient was not finite; 0: none.
    """

    def __init__(
        self,
        model: CrossanModel,
        cache: HiddenStateCache,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        precision: ComputePrecision = "fp32",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.optimizer = optimizer
        self.group = group
        self._forward: nn.Module = model
        if group is not None:
            # `Batches` fills every process's part up to one shape.
            model.process_group, model.equal_batches = group, True
            self._forward = DistributedDataParallel(
                model, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.steps = 0
        self.average = None if config.average is None else WeightAverage(model, config.average)
        self._rate_stands = False
        self._config = config
        self._precision = precision
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = next(model.parameters()).device
        self.unsound = torch.zeros((), dtype=torch.int64, device=self.device)

    def __call__(self, item_ids: Tensor, ahead: ReadAhead = NOTHING_AHEAD) -> Tensor:
        """One step, with what `crossan_fast.training.feed` read ahead of it."""
        self.set_rate()
        loss = self.compute(item_ids, ahead)
        self.finish()
        return loss

    def set_rate(self) -> None:
        """The learning rate of the step to come: apart from `compute`, so that a captured step follows it."""
        if self.steps <= self._config.warmup_steps or not self._rate_stands:
            set_learning_rate(self.optimizer, self.steps, self._config.warmup_steps)
            self._rate_stands = True

    def finish(self) -> None:
        """Average and count, behind `compute`: the average's decay rises over the first steps."""
        if self.average is not None:
            self.average.update(self.steps)
        self.steps += 1

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model has the averaged weights, where the config asks for an average."""
        return nullcontext() if self.average is None else self.average.applied()

    def compute(self, item_ids: Tensor, ahead: ReadAhead = NOTHING_AHEAD) -> Tensor:
        """All of a step that happens on the device and can be captured."""
        loss = self.forward_backward(item_ids, ahead)
        # Of several processes one alone must not leave; its gradient is everyone's, and not finite either.
        if self.group is None and loss.device.type == "cpu" and not bool(loss.isfinite()):
            raise NotFinite("loss", float(loss), self.steps + 1)
        self.update()
        return loss

    def forward_backward(self, item_ids: Tensor, ahead: ReadAhead = NOTHING_AHEAD) -> Tensor:
        """Fresh gradients of one batch, and its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            # The cache of cast weights must not outlive a capture.
            cache_enabled=self.device.type != "cuda",
        )
        with computing_in(self._precision):
            with autocast:
                loss: Tensor = self._forward(
                    item_ids, cache=self.cache, gathered=ahead.gathered, capacity=ahead.capacity
                ).loss
            with span("backward"):
                loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip what `forward_backward` left and apply it."""
        with span("optimizer"):
            norm = clip_gradients(self._parameters, self._config.clip_norm)
            self._judge(norm)
            self.optimizer.step()

    def _judge(self, norm: Tensor) -> None:
        """Before an update with gradients of this norm."""
        if self.device.type == "cpu":
            if not bool(norm.isfinite()):
                raise NotFinite("gradient", float(norm), self.steps + 1)
        else:
            bad = norm - norm != 0  # as ~isfinite, in two kernels for five
            self.unsound += (self.unsound + bad) > 0
