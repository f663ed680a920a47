"""Heads, which side_network applies, and fusion: from each tower's embedding to one of the item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossan_fast.config import CrossanConfig
from crossan_fast.modules.linear import bias_of, own, refuse_hooked, unwrapped, weight_of
from crossan_fast.ops._contracts import FusionWeights
from crossan_fast.ops._dispatch import exporting, without_autocast
from crossan_fast.ops.fusion import FusionOutput, fusion


class DeepHead(nn.Module):
    """D→D (`inner`), then D→d with nothing between (IISAN's public code).

    No Linear that holds a Linear: what replaces the outer one, as PEFT does, would lose the inner one.
    """

    def __init__(self, width: int, embedding_dim: int) -> None:
        super().__init__()
        outer = nn.Linear(width, embedding_dim)
        self.weight, self.bias = outer.weight, outer.bias
        self.inner = nn.Linear(width, width)


def make_head(width: int, embedding_dim: int, two_layers: bool) -> nn.Linear | DeepHead:
    """D→d in one layer or two."""
    return DeepHead(width, embedding_dim) if two_layers else nn.Linear(width, embedding_dim)


def folded(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight `[d, D]` and bias `[d]` of the one Linear that a head's layers amount to."""
    deep = unwrapped(head)
    if not isinstance(deep, DeepHead):
        return weight_of(head), bias_of(head)
    refuse_hooked(deep)
    weight, bias = weight_of(deep.inner), bias_of(deep.inner)
    # One product a call serves every item: not the place to save by computing in 16 bits.
    with without_autocast(weight.device.type):
        return deep.weight @ weight, F.linear(bias, deep.weight, deep.bias)


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
        count, width = len(config.experts), config.embedding_dim
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
        balance: bool = True,
        backend: str = "auto",
    ) -> FusionOutput:
        experts: Experts = own(self.experts)
        weights = FusionWeights(
            router_weight=weight_of(self.router),
            router_bias=bias_of(self.router),
            w1=experts.w1,
            b1=experts.b1,
            w2=experts.w2,
            b2=experts.b2,
        )
        return fusion(
            embeddings,
            weights,
            present=present,
            top_k=self.top_k,
            counts=counts,
            balance=balance,
            backend=backend,
        )


def make_concat(config: CrossanConfig) -> nn.Linear:
    """IISAN's fusion: a Linear over embeddings of the towers, and of an id expert, side by side."""
    count = len(config.towers) + config.id_expert
    return nn.Linear(count * config.embedding_dim, config.embedding_dim)


def concat(linear: nn.Module, embeddings: Tensor) -> Tensor:
    """`[N, T, d]` to `[N, d]`; without gradient on a CPU, equal items become equal ones."""
    weight, bias = weight_of(linear), bias_of(linear)
    towers = embeddings.flatten(1).to(weight.dtype)
    if _ranks(towers):
        # BLAS sums a row in another order where fewer stand beside it: in float64, below what fp32 keeps.
        return F.linear(towers.double(), weight.double(), bias.double()).to(weight.dtype)
    return F.linear(towers, weight, bias)


def _ranks(towers: Tensor) -> bool:
    """Whether embeddings are made to be compared: no step trains on them, and no program is written of it."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or exporting():
        return False
    return towers.device.type == "cpu"
