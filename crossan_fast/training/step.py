"""One optimizer step: loss, gradients, clipping, AdamW. It reads nothing back from the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossan_fast._finite import first_nonfinite
from crossan_fast._profiling import span
from crossan_fast._sources import ReadAhead
from crossan_fast.cache import HiddenStateCache
from crossan_fast.model import CrossanModel
from crossan_fast.ops._dispatch import choose
from crossan_fast.training.averaging import WeightAverage
from crossan_fast.training.optimizer import (
    CLIP_EPS,
    ClippedByStep,
    clip_gradients,
    each_norm,
    gradient_norms,
    set_learning_rate,
)
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
        first: the first tensor that is not finite, in words; empty where none is by itself.
    """

    def __init__(self, what: str, value: float, step: int, first: str = "") -> None:
        super().__init__(f"{what}: {value} at step {step}{f' ({first})' if first else ''}; {REMEDY}")
        self.what, self.value, self.first = what, value, first


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

    On the CPU a loss or gradient that is not finite raises `NotFinite`, which names the first tensor that is
    not; the weights stay those of the step before. A GPU is not waited for: `unsound` counts there, and the
    weights are lost. With `config.skip_nonfinite` such a step leaves weights and optimizer as they are, on
    either device, and counts as skipped; on the CPU one more than that many raises.

    Attributes:
        unsound: int64 `[]` on the device: steps from the first on whose gradient was not finite; 0: none.
            What was the first then is told by `first_bad_gradient`.
        skipped: int64 `[]` on the device: steps that were left out.
        gradient_norm: `[]` on the device: of the last step, before clipping; the next one may write over it.
        learning_rate: of the last step, the one that the groups' own are shares of.
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
        self.learning_rate = 0.0
        self._rate_stands = False
        self._config = config
        self._precision = precision
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = next(model.parameters()).device
        self.unsound = torch.zeros((), dtype=torch.int64, device=self.device)
        # On a GPU: whether a gradient was not finite, and each one's norm up to that step, or in the last one
        # that was left out.
        self._stopped = torch.zeros((), dtype=torch.bool, device=self.device)
        kind = self._parameters[0].dtype  # of gradients' norms, whatever torch makes by default
        self._norms = torch.zeros(len(self._parameters), device=self.device, dtype=kind)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.gradient_norm = torch.zeros((), device=self.device, dtype=kind)
        self._clipped: ClippedByStep | None = None
        if self.device.type == "cuda" and config.clip_norm is not None:
            self._clipped = ClippedByStep(config.clip_norm, self.device)
        self._by_kernel = self.device.type == "cuda" and _triton_judges(model, self._parameters)
        self._one: Tensor | None = None  # where backwards begin: one tensor, not one a step

    def __call__(self, item_ids: Tensor, ahead: ReadAhead = NOTHING_AHEAD) -> Tensor:
        """One step, with what `crossan_fast.training.feed` read ahead of it."""
        self.set_rate()
        loss = self.compute(item_ids, ahead)
        self.finish()
        return loss

    def set_rate(self) -> None:
        """The learning rate of the step to come: apart from `compute`, so that a captured step follows it."""
        if self.steps <= self._config.warmup_steps or not self._rate_stands:
            share = set_learning_rate(self.optimizer, self.steps, self._config.warmup_steps)
            self.learning_rate = self._config.learning_rate * share
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
        self.update(loss)
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
            if self._one is None:
                self._one = torch.ones_like(loss)
            with span("backward"):
                loss.backward(self._one)
        return loss.detach()

    def update(self, loss: Tensor) -> None:
        """Clip what `forward_backward` left of a batch with this loss and apply it."""
        with span("optimizer"):
            if self._by_kernel:
                self._judge_by_kernel(loss)
                self.optimizer.step()
                return
            norms = gradient_norms(self._parameters)
            if self._clipped is None:
                self.gradient_norm = clip_gradients(self._parameters, self._config.clip_norm, norms)
            else:
                self.gradient_norm = torch.linalg.vector_norm(norms)
                self._clipped.prepare(self.optimizer, self.gradient_norm)
            if self._judge(loss, self.gradient_norm, norms):
                self.optimizer.step()

    def _judge(self, loss: Tensor, norm: Tensor, norms: Tensor) -> bool:
        """Whether to update with gradients of this norm, together and each."""
        if self.device.type == "cpu":
            # Of several processes one alone must not leave; its gradient is everyone's, and as bad.
            if self.group is None and not bool(loss.isfinite()):
                return self._skip("loss", loss)
            return bool(norm.isfinite()) or self._skip("gradient", norm)
        if self._config.skip_nonfinite:
            bad = norm - norm != 0  # as ~isfinite, in two kernels for five
            if self.group is None:
                bad |= ~loss.isfinite()
            # AdamW's own switch: where it is 1, its kernels change nothing.
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.skipped += bad
            torch.where(bad, norms, self._norms, out=self._norms)
        else:
            torch.where(self._stopped, self._norms, norms, out=self._norms)
            # 0 times what is not finite is NaN, which is not 0 either.
            torch.ne(torch.add(self.unsound, norm, alpha=0), 0, out=self._stopped)
            self.unsound += self._stopped
        return True

    def _judge_by_kernel(self, loss: Tensor) -> None:
        """What `update` and `_judge` do of torch's ops on a GPU."""
        from crossan_fast.kernels._judging import judge

        skip = bool(self._config.skip_nonfinite)
        verdict = judge(
            each_norm(self._parameters),
            loss if self.group is None else None,
            self._norms,
            self._stopped,
            self.skipped if skip else self.unsound,
            self._config.clip_norm,
            CLIP_EPS,
            skip,
        )
        self.gradient_norm = verdict.norm
        # AdamW's own switches: it divides as it reads, and changes nothing in a step that is left out.
        self.optimizer.grad_scale = verdict.divisor  # type: ignore[attr-defined]
        self.optimizer.found_inf = verdict.bad  # type: ignore[attr-defined]

    def first_bad_gradient(self) -> str:
        """On a GPU, which is waited for: the first that was not finite, in the model's order, in words."""
        found = dict(zip(map(id, self._parameters), self._norms.tolist(), strict=True))
        for name, parameter in self.model.named_parameters():
            if not math.isfinite(norm := found.get(id(parameter), 0.0)):
                return f"gradient of {name}: expected finite values, got some of the norm {norm}"
        return ""

    def _skip(self, what: str, value: Tensor) -> bool:
        """Count a step on the CPU as left out, or raise where no more may be."""
        if int(self.skipped) >= self._config.skip_nonfinite:
            raise NotFinite(what, float(value), self.steps + 1, self._first_bad())
        self.skipped += 1
        return False

    def _first_bad(self) -> str:
        gradients = ((f"gradient of {name}", p.grad) for name, p in self.model.named_parameters())
        return (
            first_nonfinite((*self.model.named_parameters(), *self.model.named_buffers(), *gradients)) or ""
        )


def _triton_judges(model: CrossanModel, parameters: Sequence[nn.Parameter]) -> bool:
    """On a GPU: whether one Triton kernel clips and judges, as where the loss is Triton's."""
    backend = model.backend_for("in_batch_loss")
    if choose("in_batch_loss", "cuda", torch.float32, (), backend).backend != "triton":
        return False
    from crossan_fast.kernels._judging import MOST

    return len(parameters) <= MOST and all(p.dtype == torch.float32 for p in parameters)
