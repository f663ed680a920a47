"""Heads and fusion: from each tower's last hidden state to one item embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossan_fast.config import CrossanConfig
from crossan_fast.ops._contracts import FusionWeights
from crossan_fast.ops.fusion import FusionOutput, fusion


class Head(nn.Linear):
    """D→d; with two layers, D→D (`inner`) before it and nothing between (IISAN's public code)."""

    def __init__(self, width: int, embedding_dim: int, two_layers: bool) -> None:
        super().__init__(width, embedding_dim)
        self.inner = nn.Linear(width, width) if two_layers else None

    def enter(self, hidden: Tensor) -> Tensor:
        """What the last Linear reads."""
        if self.inner is None:
            return hidden
        return F.linear(hidden.to(self.inner.weight.dtype), self.inner.weight, self.inner.bias)


class Experts(nn.Module):
    """◊ One two-layer perceptron a modality; `w2` starts small, so an expert starts near the identity."""

    def __init__(self, count: int, width: int, expansion: int, std: float) -> None:
        super().__init__()
        inner = expansion * width
        self.w1 = nn.Parameter(torch.randn(count, inner, width) * width**-0.5)
        self.b1 = nn.Parameter(torch.zeros(count, inner))
        self.w2 = nn.Parameter(torch.randn(count, width, inner) * std)
        self.b2 = nn.Parameter(torch.zeros(count, width))


class Momef(nn.Module):
    """Mixture of modality expert fusion ◊; the arithmetic is `crossan_fast.ops.fusion`'s."""

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__()
        count, width = len(config.modalities), config.embedding_dim
        self.top_k = config.top_k
        self.router = nn.Linear(count * width, count)
        # Near-zero weights: every modality starts with nearly the same say.
        nn.init.normal_(self.router.weight, std=config.adapter_std)
        nn.init.zeros_(self.router.bias)
        self.experts = Experts(count, width, config.expert_expansion, config.adapter_std)

    def forward(
        self,
        hidden: Sequence[Tensor],
        heads: nn.ModuleDict,
        *,
        present: Tensor | None = None,
        counts: Tensor | None = None,
        backend: str = "auto",
    ) -> FusionOutput:
        layers = [cast(Head, head) for head in heads.values()]
        experts = self.experts
        weights = FusionWeights(
            head_weight=[head.weight for head in layers],
            head_bias=[head.bias for head in layers],
            router_weight=self.router.weight,
            router_bias=self.router.bias,
            w1=experts.w1,
            b1=experts.b1,
            w2=experts.w2,
            b2=experts.b2,
        )
        entered = [head.enter(h) for head, h in zip(layers, hidden, strict=True)]
        return fusion(entered, weights, present=present, top_k=self.top_k, counts=counts, backend=backend)


class Concat(nn.Linear):
    """IISAN's fusion: a Linear over concatenated heads; a tower with no present source enters as zeros."""

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__(len(config.towers) * config.embedding_dim, config.embedding_dim)
        self.sources = [list(tower.sources) for tower in config.towers]

    def forward(  # type: ignore[override]
        self, hidden: Sequence[Tensor], heads: nn.ModuleDict, *, present: Tensor | None = None
    ) -> Tensor:
        embeddings = []
        layers = [cast(Head, head) for head in heads.values()]
        for head, h, source in zip(layers, hidden, self.sources, strict=True):
            e = F.linear(head.enter(h).to(head.weight.dtype), head.weight, head.bias)
            if present is not None:
                e = torch.where(present[:, source].any(dim=1, keepdim=True), e, 0)
            embeddings.append(e)
        return super().forward(torch.cat(embeddings, dim=1))
