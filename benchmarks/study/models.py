"""`CrossanModel` with encoders in the loop; loss, sequence encoder and evaluation are its own.

Its other kin, SASRec by ids, is the library's (`crossan_fast.sasrec`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from benchmarks.study.backbones import Backbone
from crossan_fast._sources import Gathered, ReadAhead, Source, from_encoders
from crossan_fast.config import CrossanConfig
from crossan_fast.model import CrossanModel

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache


class _Uncached(CrossanModel):
    def _encode_ids(self, cache: HiddenStateCache, ids: Tensor, gathered: Gathered | None) -> Tensor:
        return self._encode(self._read(cache, ids, ReadAhead()), None)[0]


class LiveModel(_Uncached):
    """IISAN or CROSSAN uncached: frozen encoders give the states of a batch's distinct items.

    Of the cache nothing is read; it only says which items there are.
    """

    def __init__(self, config: CrossanConfig, backbones: Iterable[Backbone], backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.backbones = nn.ModuleList(backbone.freeze() for backbone in backbones)

    def train(self, mode: bool = True) -> LiveModel:
        super().train(mode)
        self.backbones.eval()
        return self

    def _read(self, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
        """As `model(item_ids, encoders=…)` does; that the trainer hands over a cache changes nothing."""
        encoders = [cast(Backbone, backbone).states for backbone in self.backbones]
        return from_encoders(self.config, encoders, ids)


class TrainedModel(_Uncached):
    """Encoders that are trained, whole or in part: heads on their last states, then a Linear.

    They stand where the side network does, so that the optimizer gives them its learning rate.
    """

    def __init__(self, config: CrossanConfig, backbones: Iterable[Backbone], backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.towers = nn.ModuleList(backbones)  # type: ignore[assignment]

    def _read(self, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
        return Source((), None, ids, None)

    def _embed(self, source: Source) -> Tensor:
        assert source.ids is not None
        found: dict[str, Tensor] = {}
        for backbone in self.towers:
            found |= cast(Backbone, backbone).last(source.ids)
        return torch.stack([self.heads[name](found[name]) for name in self.config.modality_names], dim=1)
