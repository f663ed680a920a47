"""Heads, which side_network applies, and fusion: from each tower's embedding to one of the item."""

from __future__ import annotations

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

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight `[d, D]` and bias `[d]` of the one Linear that the layers amount to."""
        if self.inner is None:
            return self.weight, self.bias
        # One product a call serves every item: not the place to save by computing in 16 bits.
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight @ self.inner.weight, F.linear(self.inner.bias, self.weight, self.bias)


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
        embeddings: Tensor,
        *,
        present: Tensor | None = None,
        counts: Tensor | None = None,
        backend: str = "auto",
    ) -> FusionOutput:
        experts = self.experts
        weights = FusionWeights(
            router_weight=self.router.weight,
            router_bias=self.router.bias,
            w1=experts.w1,
            b1=experts.b1,
            w2=experts.w2,
            b2=experts.b2,
        )
        return fusion(embeddings, weights, present=present, top_k=self.top_k, counts=counts, backend=backend)


class Concat(nn.Linear):
    """IISAN's fusion: a Linear over the towers' embeddings side by side."""

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__(len(config.towers) * config.embedding_dim, config.embedding_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """`[N, T, d]` to `[N, d]`."""
        return super().forward(embeddings.flatten(1).to(self.weight.dtype))
