"""For the sequence encoder's tests: random weights and masks, a run with all gradients, a small module."""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast import CrossanConfig, Modality
from crossan_fast.modules.sequence_encoder import SequenceEncoder
from crossan_fast.ops import SequenceEncoderBlock, SequenceEncoderWeights, sequence_encoder

SEED = torch.tensor(-(2**40) - 12345)


def problem(batch=4, places=3, width=6, inner=10, blocks=2, window=5, dtype=torch.float64, full=False):
    """items, mask, and flat weights."""

    def r(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)

    lengths = torch.randint(0, places + 1, (batch, 1)).clamp_min(places if full else 0)
    mask = torch.arange(places) >= places - lengths
    d, f = width, inner
    shapes = [(d, d)] * 4 + [(d,)] * 2 + [(f, d), (f,), (d, f), (d,), (d,), (d,)]
    flat = [r(window, d), r(d), r(d), *(r(*shape) for _ in range(blocks) for shape in shapes)]
    for block in range(blocks):
        # Units on and off, none near ReLU's kink: rounding would switch some, each a jump in the gradients.
        flat[12 * block + 9].mul_(0.1)
        flat[12 * block + 10].sign_()
    return r(batch, places, d) * d**0.5, mask, flat


def grouped(flat) -> SequenceEncoderWeights:
    blocks = [SequenceEncoderBlock(*flat[i : i + 12]) for i in range(3, len(flat), 12)]
    return SequenceEncoderWeights(*flat[:3], blocks)


def run(items, mask, flat, heads, function=sequence_encoder, **kwargs) -> list[Tensor]:
    """Users, then the gradients of items and weights."""
    leaves = [t.detach().requires_grad_() for t in (items, *flat)]
    users = function(leaves[0], mask, grouped(leaves[1:]), heads, **kwargs)
    cotangent = torch.randn(users.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(users, leaves, cotangent.to(users.dtype))
    return [users.detach(), *found]


def encoder(**overrides) -> SequenceEncoder:
    torch.manual_seed(3)
    config = CrossanConfig([Modality("text", 4, 2)], embedding_dim=16, window=5, **overrides)
    module = SequenceEncoder(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


MASK = torch.arange(5) >= torch.tensor([[0], [2], [5], [4]])
