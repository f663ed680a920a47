"""SASRec (arXiv 1808.09781) as IISAN's public code has it: post-norm blocks over item embeddings."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from crossan_fast.config import CrossanConfig
from crossan_fast.modules.linear import bias_of, own, weight_of
from crossan_fast.ops._contracts import SequenceEncoderBlock, SequenceEncoderWeights
from crossan_fast.ops._dispatch import exporting
from crossan_fast.ops.sequence_encoder import EPS, sequence_encoder, sequence_encoder_reference


class Attention(nn.Module):
    """The weights of multi-head self-attention without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """xformers' attention over the real items alone, one causal block a sequence; see `ops.sequence_encoder`.

    The lengths pass through the host.
    """
    from xformers.ops import fmha

    lengths = [length for length in mask.sum(dim=1).tolist() if length]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = torch.zeros_like(v)
    if lengths:
        bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        real = fmha.memory_efficient_attention(
            q[mask][None], k[mask][None], v[mask][None], attn_bias=bias, p=dropout
        )
        mixed[mask] = real[0].to(mixed.dtype)
    return mixed.transpose(1, 2)


class Block(nn.Module):
    """The weights of attention, then of a ReLU feed-forward of width 4d, each with its LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.forward_norm = nn.LayerNorm(width, eps=EPS)

    def weights(self) -> SequenceEncoderBlock:
        attention: Attention = own(self.attention)
        after, last = own(self.attention_norm), own(self.forward_norm)
        return SequenceEncoderBlock(
            weight_of(attention.query),
            weight_of(attention.key),
            weight_of(attention.value),
            weight_of(attention.out),
            after.weight,
            after.bias,
            weight_of(self.widen),
            bias_of(self.widen),
            weight_of(self.narrow),
            bias_of(self.narrow),
            last.weight,
            last.bias,
        )


class SequenceEncoder(nn.Module):
    """The weights of learned positions, a LayerNorm and the blocks, in the op's terms.

    What is computed with them is `crossan_fast.ops.sequence_encoder`; with `attention="xformers"` its
    reference, around xformers' attention.

    Raises:
        ImportError: `attention="xformers"` where xformers is not installed.
    """

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.position = nn.Embedding(config.window, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = config.dropout
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.blocks))
        self.heads = config.attention_heads
        self.packed = config.attention == "xformers"
        if self.packed:
            import xformers.ops  # noqa: F401  (fail at construction, not at the first step)
        self.apply(_initialise)

    def weights(self) -> SequenceEncoderWeights:
        blocks = [cast(Block, own(block)).weights() for block in self.blocks]
        norm = own(self.norm)
        return SequenceEncoderWeights(own(self.position).weight, norm.weight, norm.bias, blocks)

    def forward(self, items: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
        """items `[B, S, d]`, mask bool `[B, S]` → users `[B, S, d]`; the last place is the user's vector.

        Sequences shorter than the window stand at its end, as left padding puts them. Users are zeros at
        padding.
        """
        dropout = self.dropout if self.training else 0.0
        if not self.packed or exporting():
            return sequence_encoder(items, mask, self.weights(), self.heads, dropout=dropout, backend=backend)
        if items.device.type != "cuda":
            raise ValueError(
                f"attention: 'xformers' runs on CUDA, expected a CUDA device, got {items.device}"
            )
        return sequence_encoder_reference(
            items, mask, self.weights(), self.heads, dropout=dropout, attend=_packed
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
