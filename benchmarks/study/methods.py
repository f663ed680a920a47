"""What is compared, and how each method's model is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from benchmarks.study.adaptation import Adaptation, adapt
from benchmarks.study.models import LiveModel, TrainedModel
from benchmarks.study.worlds import World
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.model import CrossanModel
from crossan_fast.sasrec import SasRec
from crossan_fast.training import OptimizerConfig

Kind = Literal["trained", "uncached", "cached", "ids"]

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Method:
    """Attributes:
    name: in rows and on the command line.
    title: in tables.
    kind: encoders trained, frozen in the loop, or run beforehand; or ids alone.
    what: how encoders are adapted, or which side network.
    backend: of the library's ops.
    rate: the encoders' learning rate over that of all else.
    accuracy_of: the method that is the same model, whose accuracy is this one's too.
    """

    name: str
    title: str
    kind: Kind
    what: str = ""
    backend: str = "auto"
    rate: float = 1.0
    accuracy_of: str = ""

    @property
    def learns_as(self) -> str:
        return self.accuracy_of or self.name

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=LEARNING_RATE, side_network=self.rate)


METHODS = {
    method.name: method
    for method in (
        Method("fft", "Full fine-tuning", "trained", "full", rate=0.05),
        Method("adapter", "Adapter (Houlsby)", "trained", "houlsby", rate=0.5),
        Method("lora", "LoRA", "trained", "lora", rate=0.5),
        Method("bitfit", "BitFit", "trained", "bitfit", rate=0.5),
        Method("iisan_uncached", "IISAN, uncached", "uncached", "iisan", accuracy_of="iisan_fast"),
        Method("crossan_uncached", "CROSSAN, uncached", "uncached", "crossan", accuracy_of="crossan_fast"),
        Method("iisan_eager", "IISAN, cached, eager", "cached", "iisan", "eager", accuracy_of="iisan_fast"),
        Method("iisan_fast", "IISAN, cached, fast", "cached", "iisan"),
        Method(
            "crossan_eager",
            "CROSSAN, cached, eager",
            "cached",
            "crossan",
            "eager",
            accuracy_of="crossan_fast",
        ),
        Method("crossan_fast", "CROSSAN, cached, fast", "cached", "crossan"),
        Method("sasrec_id", "SASRec, ids", "ids"),
    )
}


def config_of(method: Method, world: World) -> CrossanConfig:
    """The model's config: what a size sets is the same for every method."""
    size = world.size
    modalities = [Modality(m.name, m.width, m.levels) for m in world.cache.modalities]
    common = {
        "embedding_dim": size.embedding_dim,
        "bottleneck": size.bottleneck,
        "window": size.window,
        "dropout": size.dropout,
    }
    if method.what == "iisan":
        return CrossanConfig.iisan(modalities, **common)
    if method.what == "crossan":
        return CrossanConfig.from_dict({"modalities": modalities, **common})
    return CrossanConfig.from_dict({"modalities": modalities, "fusion": "concat", "cross": "none", **common})


def make_model(method: Method, world: World, seed: int) -> CrossanModel:
    """The method's model over a world's items, on its device, with the popularity of its split."""
    torch.manual_seed(seed)
    config = config_of(method, world)
    model: CrossanModel
    if method.kind == "cached":
        model = CrossanModel(config, backend=method.backend)
    elif method.kind == "ids":
        model = SasRec(config, world.cache.num_items, backend=method.backend)
    elif method.kind == "uncached":
        model = LiveModel(config, world.backbones().values(), backend=method.backend)
    else:
        backbones = world.backbones()
        for backbone in backbones.values():
            backbone.model = adapt(backbone.model, cast(Adaptation, method.what))
        model = TrainedModel(config, backbones.values(), backend=method.backend)
    model.set_popularity(world.split)
    return model.to(world.device).train()


def trainable(model: CrossanModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
