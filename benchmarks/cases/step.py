"""The whole training step: model, gradients, clipping and AdamW, from item ids and a resident cache.

The baseline is the plain reference without deduplication: every place of the batch is encoded. In bf16 every
implementation runs under autocast with fp32 weights, as training does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, cast

import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.cases._iisan import PublicIisan
from benchmarks.cases._shared import WINDOW, random_sequences
from benchmarks.cases.side_network import CATALOGUE, Shape
from benchmarks.registry import (
    KERNELS,
    Case,
    CheckFailed,
    Floor,
    Runnable,
    Setting,
    Unavailable,
    Workload,
    register,
)
from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache
from crossan_fast._sources import ReadAhead
from crossan_fast.config import Architecture
from crossan_fast.training import OptimizerConfig, TrainStep, make_optimizer
from crossan_fast.training.feed import bucket
from crossan_fast.training.graph import GraphedStep, refusal
from crossan_fast.training.train_config import ComputePrecision

CHECKED_USERS, CHECKED_ITEMS = 16, 512
WARMUP = 3  # eager steps before a capture
RECIPE = Shape(items=0, modalities=2, width=384)
PAPER = Shape(items=0)
PAIR = replace(PAPER, modalities=2)


@dataclass(frozen=True)
class Made:
    """A step and, where it is captured, what replays it."""

    step: TrainStep
    graphed: GraphedStep | None = None

    @property
    def call(self) -> Callable[[Tensor, ReadAhead], Tensor]:
        return self.step if self.graphed is None else self.graphed


@dataclass(frozen=True)
class StepBench:
    """What the step's cases share: a cache, batches of ids, and models with the same weights.

    Attributes:
        batches: item ids `[B, S + 1]` of each input set.
        counts: interactions of each item, for the popularity correction.
    """

    setting: Setting
    config: CrossanConfig
    cache: HiddenStateCache
    batches: list[Tensor]
    counts: Tensor

    def workload(
        self,
        floors: dict[str, Floor] | None = None,
        peers: Mapping[str, Callable[[StepBench], PublicIisan]] | None = None,
    ) -> Workload:
        checks: dict[str, Callable[[], None]] = {}

        def make(name: str) -> Runnable:
            made = self.made(name)
            checks[name] = partial(self.check, name, made)
            return Runnable(
                lambda index: [made.call(self.batches[index], self.ahead)],
                memory=not name.endswith("-graph"),
            )

        def make_peer(name: str, build: Callable[[StepBench], PublicIisan]) -> Runnable:
            peer = build(self)
            checks[name] = partial(peer.check, name, CHECKED_USERS)
            return Runnable(lambda index: [peer(index)])

        names = ("eager", "compiled", *KERNELS)
        return Workload(
            len(self.batches),
            {name: partial(make, name) for name in names}
            | {name: partial(make_peer, name, build) for name, build in (peers or {}).items()},
            lambda name, _: checks[name](),
            floors or {},
        )

    @cached_property
    def ahead(self) -> ReadAhead:
        """The slots that every batch gets on a GPU, as training's feed counts them."""
        if self.setting.device.type == "cpu":
            return ReadAhead()
        most = max(batch.unique().numel() for batch in self.batches) + 1
        return ReadAhead(capacity=bucket(most, self.batches[0].numel() + 1))

    def made(self, name: str) -> Made:
        """An implementation by its name; `Unavailable` where it can't be captured."""
        if name in ("eager", "compiled"):
            return Made(self.reference(compiled=name == "compiled"))
        step = self.step(name.removesuffix("-graph"))
        if not name.endswith("-graph"):
            return Made(step)
        if reason := refusal(step):
            raise Unavailable(reason)
        return Made(step, GraphedStep(step, warmup=WARMUP))

    def model(self, backend: str, deduplicate: bool, dropout: float | None = None) -> CrossanModel:
        config = replace(self.config, deduplicate=deduplicate)
        if dropout is not None:
            config = replace(config, dropout=dropout)
        torch.manual_seed(0)
        model = CrossanModel(config, backend=backend).to(self.setting.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Gates as training leaves them: at 0 the cross terms would be multiplications by nothing.
                if "cross" in name or name.endswith("gate"):
                    parameter.normal_(std=0.1)
        model.set_popularity(self.counts)
        return model

    def step(self, backend: str, deduplicate: bool = True) -> TrainStep:
        model, optimizer = self.model(backend, deduplicate), OptimizerConfig()
        precision: ComputePrecision = "bf16" if self.setting.dtype == torch.bfloat16 else "fp32"
        return TrainStep(model, self.cache, make_optimizer(model, optimizer), optimizer, precision)

    def reference(self, compiled: bool = False) -> TrainStep:
        step = self.step("eager", deduplicate=False)
        if compiled:
            step.model.compile(
                mode="max-autotune", dynamic=False
            )  # in place: the step calls this very module
        return step

    def check(self, name: str, made: Made) -> None:
        """Loss and gradients of some users, dropout off, before the first update, against float64.

        Then what is to be captured is, so that no call that is timed does it.
        """
        step = made.step
        plain = self._gradients(self.step("eager", deduplicate=False))
        found = self._gradients(step)
        names = ["loss", *(f"gradient of {key}" for key, _ in step.model.named_parameters())]
        names, (plain, found, truth) = accuracy.together(names, plain, found, self._truth)
        own = [accuracy.error(p, t) for p, t in zip(plain, truth, strict=True)]
        cache, ids = self._checked
        places = ids.numel() if self.config.loss == "in_batch" else cache.num_items
        terms = places * sum(modality.width for modality in self.config.modalities)
        accuracy.compare(name, names, found, truth, own, self.setting.dtype, terms)
        if made.graphed is not None:
            for _ in range(WARMUP + 2):
                loss = made.graphed(self.batches[0], self.ahead)
            if made.graphed.reason is not None or not bool(loss.isfinite()):
                raise CheckFailed(f"{name}: {made.graphed.reason or f'loss {float(loss)} when replayed'}")

    @cached_property
    def _checked(self) -> tuple[HiddenStateCache, Tensor]:
        """What a check computes on; of a catalogue that is encoded whole, some items."""
        ids = self.batches[0][:CHECKED_USERS]
        if self.config.loss == "in_batch":
            return self.cache, ids
        states = self.cache.gather(torch.arange(CHECKED_ITEMS + 1, device=self.setting.device))
        some = torch.where(ids == 0, 0, ids % CHECKED_ITEMS + 1)
        return HiddenStateCache.from_tensors(states), some

    @cached_property
    def _truth(self) -> list[Tensor]:
        model = self.model("eager", deduplicate=True).double()
        config = OptimizerConfig()
        return self._gradients(TrainStep(model, self.cache, make_optimizer(model, config), config))

    def _gradients(self, step: TrainStep) -> list[Tensor]:
        whole, (step.cache, ids) = step.cache, self._checked
        step.model.eval()
        loss = step.forward_backward(ids)
        step.model.train()
        step.cache = whole
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in step.model.parameters()
        ]
        step.optimizer.zero_grad(set_to_none=True)
        return [loss, *gradients]


def random_cache(shape: Shape, rows: int, setting: Setting, stored: torch.dtype) -> HiddenStateCache:
    generator = setting.generator(f"cache/{shape}/{rows}")
    states = {}
    for modality in shape.config().modalities:
        size = (rows + 1, shape.levels, shape.width)
        tensor = torch.randn(size, device=setting.device, generator=generator, dtype=torch.float32)
        tensor[0] = 0
        states[modality.name] = tensor.to(stored)
    return HiddenStateCache.from_tensors(states)


def step_floor(bench: StepBench, shape: Shape, loss: str) -> Floor:
    """The encoder over the distinct items, the loss' products, and AdamW over the parameters."""
    distinct = CATALOGUE
    if loss == "in_batch":
        distinct = sum(b.unique().numel() for b in bench.batches) // len(bench.batches)
    encoder = replace(shape, items=distinct).encoder_floors(torch.bfloat16.itemsize)["both"]
    parameters = sum(p.numel() for p in bench.model("eager", deduplicate=True).parameters())
    rows = bench.batches[0].shape[0] * WINDOW
    # The update reads weight, gradient and two moments and writes three of them, all fp32.
    return Floor(encoder.bytes + 28.0 * parameters, encoder.flops + 8.0 * rows * distinct * shape.embedding)


def random_bench(shape: Shape, config: CrossanConfig, users: int, setting: Setting) -> StepBench:
    generator = setting.generator(f"step/{shape}/{users}")
    return StepBench(
        setting,
        config,
        random_cache(shape, CATALOGUE, setting, torch.bfloat16),
        [random_sequences(users, CATALOGUE, setting.device, generator) for _ in range(8)],
        torch.arange(1, CATALOGUE + 2).float().rsqrt() * 1e4,
    )


def build(shape: Shape, users: int, loss: Literal["in_batch", "full"], setting: Setting) -> Workload:
    bench = random_bench(shape, replace(shape.config(), loss=loss), users, setting)
    return bench.workload({"run": step_floor(bench, shape, loss)})


def build_pair(architecture: Architecture, setting: Setting) -> Workload:
    """Two modalities, as IISAN's paper has them, beside its public code: of either model, on the same states.

    IISAN has a tower of the pair and heads of two layers.
    """
    modalities = PAIR.config().modalities
    config = CrossanConfig.iisan(modalities) if architecture == "iisan" else CrossanConfig(modalities)
    bench = random_bench(PAIR, config, 64, setting)
    floors = {} if architecture == "iisan" else {"run": step_floor(bench, PAIR, "in_batch")}
    return bench.workload(floors, {"iisan": PublicIisan})


for shape, users, loss, importance, tag in (
    (PAPER, 64, "in_batch", 3, "paper"),
    (PAPER, 1_024, "in_batch", 3, "paper"),
    (RECIPE, 64, "in_batch", 11, "recipe"),
    (PAPER, 64, "full", 12, "paper"),
    (RECIPE, 64, "full", 20, "recipe"),
    (RECIPE, 256, "full", 20, "recipe"),
    (PAPER, 256, "in_batch", 39, "batch"),
    (PAPER, 4_096, "in_batch", 39, "batch"),
):
    # The reference encodes every place of the batch, for the full softmax the catalogue as well, and holds
    # several matrices of a logit for each row and column.
    places = users * (WINDOW + 1)
    items = places + (CATALOGUE if loss == "full" else 0)
    logits = users * WINDOW * (CATALOGUE if loss == "full" else places)
    register(
        Case(
            name=f"step/B={users},M={shape.modalities},D={shape.width},loss={loss}",
            build=partial(build, shape, users, cast(Literal["in_batch", "full"], loss)),
            tags=frozenset({"step", tag}),
            importance=importance,
            compiled=users == 64 and loss == "in_batch",
            reference_bytes=replace(shape, items=items).reference_bytes(4) + 20.0 * logits,
        )
    )
for architecture, named in (("iisan", "architecture=iisan,"), ("crossan", "")):
    register(
        Case(
            name=f"step/B=64,M=2,D=768,{named}loss=in_batch",
            build=partial(build_pair, cast(Architecture, architecture)),
            tags=frozenset({"step", "paper"}),
            importance=12,
            reference_bytes=1.5 * replace(PAIR, items=64 * (WINDOW + 1)).reference_bytes(4),
        )
    )
