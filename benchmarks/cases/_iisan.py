"""The public code of IISAN, github.com/GAIR-Lab/IISAN, as a peer of the training step.

None of it is here. CROSSAN_FAST_IISAN names a clone, whose package `Code_Cached/model` is imported as it
stands, under a name of ours: `model` is anyone's. Its device is an argument (`local_rank`), so nothing has to
be patched. Sizes, dropout and Adam are what its `run.py`, `scripts/run_IISAN.py` and `parameters.py` set; its
five groups of learning rates, which no time depends on, are one.

What `run.py` does around a step is left out: reading states from files, DistributedDataParallel, autocast and
gradient scaling, which are for CUDA alone, and both backbones, which go when the towers come.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.registry import CheckFailed, Unavailable
from crossan_fast import CrossanConfig, CrossanModel

if TYPE_CHECKING:
    from benchmarks.cases.step import StepBench

VARIABLE = "CROSSAN_FAST_IISAN"
_MODULE = "benchmarks_public_iisan"
_CLONE = "a clone of github.com/GAIR-Lab/IISAN"
# Written in its code: the width of towers, and how many levels are stored, of which every other is read.
WIDTH, STORED, STEP = 768, 13, 2
LEARNING_RATE = 2e-4


def load() -> Any:
    """Its package `Code_Cached/model`; `Unavailable` where there is no clone, or what it needs is missing."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise Unavailable(f"{VARIABLE} is not set, expected the path of {_CLONE}")
    package = Path(folder).expanduser() / "Code_Cached" / "model"
    spec = importlib.util.spec_from_file_location(
        _MODULE, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None or not (package / "model.py").is_file():
        raise Unavailable(f"{VARIABLE}: expected the path of {_CLONE}, {package / 'model.py'} is no file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # its modules import one another by this name
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[_MODULE]
        raise Unavailable(f"{VARIABLE}: {package} can't be imported: {error}") from error
    return module


def arguments(config: CrossanConfig) -> Namespace:
    """What its model reads of its command line: values of ours where the case has them, else its defaults."""
    layers = ",".join(str(level - 1) for level in range(STEP, STORED, STEP))  # level 0 is always read
    return Namespace(
        embedding_dim=config.embedding_dim,
        cv_adapter_down_size=config.bottleneck,
        bert_adapter_down_size=config.bottleneck,
        max_seq_len=config.window,
        transformer_block=config.blocks,
        num_attention_heads=config.attention_heads,
        drop_rate=config.dropout,
        word_embedding_dim=WIDTH,
        side_adapter_vit_list=layers,
        side_adapter_bert_list=layers,
        side_adapter_mm_list=layers,
        modality="intra_inter",
        fusion_method="gated",
        remove_first="None",
        adapter_activation="RELU",
        adapter_dropout_rate=0.1,  # which its adapters don't apply
        l2_weight=0.0,
        news_attributes=["title"],
        num_words_title=30,
        num_words_abstract=50,
        num_words_body=50,
    )


class PublicIisan:
    """A training step of the public model: from an input set's number to the loss.

    Every place of a batch has its states, as its data set stacks them: fp32 `[B, S + 1, 13, 768]` of each of
    two modalities, zeros at padding. They lie in memory before a step begins.
    """

    def __init__(self, bench: StepBench) -> None:
        if bench.setting.dtype != torch.float32:
            raise Unavailable("IISAN's public code is compared in fp32 alone")
        self._bench, self._device = bench, bench.setting.device
        public, options = load(), arguments(bench.config)
        torch.manual_seed(0)
        # Its last layer of images is the classifier of their backbone; that of texts it makes by itself.
        backbone = nn.ModuleDict({"classifier": nn.Linear(WIDTH, options.embedding_dim)})
        popularity = bench.model("eager", deduplicate=True).item_popularity.tolist()
        self.model = public.ModelMM(options, len(popularity) - 1, True, backbone, None, popularity)
        self.model.mm_encoder = public.IISANAdaptedMModel(self.model.mm_encoder, options)
        self.model.to(self._device)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "gate" in name:  # as training leaves them
                    parameter.normal_(std=0.1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self._inputs = [self._stacked(ids) for ids in bench.batches]

    def __call__(self, index: int) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.model(*self._inputs[index], self._device)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def check(self, name: str, users: int) -> None:
        """Loss and every gradient of some users, dropout off, against float64 of ours on its weights.

        Masks, negatives and popularity are one convention in both, so that all of it is comparable.
        `CrossanModel.from_iisan` brings its weights to our names, and its gradients likewise.

        Raises:
            CheckFailed: they differ by more than rounding, or in how many parameters are trained.
        """
        ours = self._of_ours(torch.float64)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if trained != (expected := sum(p.numel() for p in ours.parameters())):
            raise CheckFailed(f"{name}: {trained:,} trained parameters, expected {expected:,} as ours has")
        ids = self._bench.batches[0][:users]
        truth = self._gradients(ours, ids)
        plain = self._gradients(self._of_ours(torch.float32), ids)
        self.model.eval()
        loss = self.model(*self._stacked(ids), self._device)
        loss.backward()
        self.model.train()
        gradients = {key: p.grad for key, p in self.model.named_parameters()}
        found = [loss.detach(), *CrossanModel.from_iisan(gradients).parameters()]
        self.optimizer.zero_grad()
        names = ["loss", *(f"gradient of {key}" for key, _ in ours.named_parameters())]
        own = [accuracy.error(p, t) for p, t in zip(plain, truth, strict=True)]
        accuracy.compare(name, names, found, truth, own, torch.float32, 2 * WIDTH * ids.numel())

    def _stacked(self, ids: Tensor) -> tuple[Tensor, ...]:
        """A batch as its data set gives it: ids of all places, states of both modalities, histories' mask."""
        states = []
        for rows in self._states(ids):
            stored = rows.new_zeros(*ids.shape, STORED, WIDTH)
            stored[:, :, ::STEP] = rows
            states.append(stored)
        return (ids.reshape(-1), *states, (ids[:, :-1] != 0).float())

    def _states(self, ids: Tensor) -> list[Tensor]:
        """`[B, S + 1, L, D]` of each modality, fp32."""
        gathered = self._bench.cache.gather(ids.reshape(-1))
        return [rows.float().unflatten(0, ids.shape) for rows in gathered.values()]

    def _of_ours(self, dtype: torch.dtype) -> CrossanModel:
        model = CrossanModel.from_iisan(self.model.state_dict(), backend="eager")
        model.set_popularity(self._bench.counts)
        return model.to(self._device, dtype).eval()

    def _gradients(self, model: CrossanModel, ids: Tensor) -> list[Tensor]:
        dtype = next(model.parameters()).dtype
        states = [rows.to(dtype) for rows in self._states(ids)]
        loss = model(ids, dict(zip(("image", "text"), states, strict=True))).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
