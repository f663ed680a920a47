"""SASRec (arXiv 1808.09781) as IISAN's public code has it: post-norm blocks over item embeddings."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossan_fast.config import CrossanConfig
from crossan_fast.ops._contracts import SequenceEncoderBlock, SequenceEncoderWeights
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops.sequence_encoder import EPS, sequence_encoder


class Attention(nn.Module):
    """Multi-head self-attention without biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, packed: bool) -> Tensor:
        """x `[B, S, d]`; mask bool `[B, S]`, True at real items, which stand at the end of each row."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        p = self.dropout if self.training else 0.0
        mixed = _packed(q, k, v, mask, p) if packed else _dense(q, k, v, mask, p)
        return self.out(mixed.flatten(-2))


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """q, k, v `[B, S, heads, d / heads]`."""
    places = mask.shape[1]
    causal = torch.ones(places, places, dtype=torch.bool, device=mask.device).tril()
    # A padding place sees itself, so that its softmax is not over nothing; nobody reads its output.
    itself = torch.eye(places, dtype=torch.bool, device=mask.device)
    seen = (causal & mask[:, None, :]) | itself
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], dropout_p=dropout)
    return mixed.transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """The same over the real items alone, one causal block a sequence; the lengths pass through the host."""
    from xformers.ops import fmha

    lengths = [length for length in mask.sum(dim=1).tolist() if length]
    mixed = torch.zeros_like(v)
    if lengths:
        bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        real = fmha.memory_efficient_attention(
            q[mask][None], k[mask][None], v[mask][None], attn_bias=bias, p=dropout
        )
        mixed[mask] = real[0].to(mixed.dtype)
    return mixed


class Block(nn.Module):
    """Attention, then a ReLU feed-forward of width 4d, each with dropout, residual and LayerNorm after."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.forward_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def weights(self) -> SequenceEncoderBlock:
        attention, after, last = self.attention, self.attention_norm, self.forward_norm
        return SequenceEncoderBlock(
            attention.query.weight,
            attention.key.weight,
            attention.value.weight,
            attention.out.weight,
            after.weight,
            after.bias,
            self.widen.weight,
            self.widen.bias,
            self.narrow.weight,
            self.narrow.bias,
            last.weight,
            last.bias,
        )

    def forward(self, x: Tensor, mask: Tensor, packed: bool) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, packed)))
        return self.forward_norm(x + self.dropout(self.narrow(F.relu(self.widen(x)))))


class SequenceEncoder(nn.Module):
    """Learned positions, LayerNorm, dropout, then the blocks.

    `backend="eager"` runs the modules below one by one; the compiled op (`crossan_fast.ops.sequence_encoder`)
    takes their weights and runs them as one, on the real places alone.

    Raises:
        ImportError: `attention="xformers"` where xformers is not installed.
    """

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.position = nn.Embedding(config.window, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.attention_heads, config.dropout) for _ in range(config.blocks)
        )
        self.heads = config.attention_heads
        self.packed = config.attention == "xformers"
        if self.packed:
            import xformers.ops  # noqa: F401  (fail at construction, not at the first step)
        self.apply(_initialise)

    def weights(self) -> SequenceEncoderWeights:
        blocks = [cast(Block, block).weights() for block in self.blocks]
        return SequenceEncoderWeights(self.position.weight, self.norm.weight, self.norm.bias, blocks)

    def forward(self, items: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
        """items `[B, S, d]`, mask bool `[B, S]` → users `[B, S, d]`; the last place is the user's vector.

        Sequences shorter than the window stand at its end, as left padding puts them. Nobody reads the output
        at padding; it is zeros from the op.
        """
        if self.packed and items.device.type != "cuda":
            raise ValueError(
                f"attention: 'xformers' runs on CUDA, expected a CUDA device, got {items.device}"
            )
        dtype = torch.promote_types(items.dtype, self.position.weight.dtype)
        choice = choose("sequence_encoder", items.device.type, dtype, (), backend)
        if choice.backend != "eager":
            return self._fused(items, mask, choice.backend)
        places = self.position.weight[-items.shape[1] :]
        x = self.dropout(self.norm(items + places))
        for block in self.blocks:
            x = block(x, mask, self.packed)
        return x

    def _fused(self, items: Tensor, mask: Tensor, backend: str) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        # From torch's own generator: a run repeats under torch.manual_seed, and no two steps drop the same.
        seed = torch.randint(2**63 - 1, (), device=items.device) if p else None
        return sequence_encoder(
            items, mask, self.weights(), self.heads, dropout=p, seed=seed, backend=backend
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
