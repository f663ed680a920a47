"""The sequence encoder's definition, against torch's own layers, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_encoders import MASK, SEED, encoder, grouped, problem

from crossan_fast.ops.sequence_encoder import (
    EPS,
    dropout_mask,
    sequence_encoder,
    sequence_encoder_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_reference_equals_torchs_own_layers():
    """`nn.TransformerEncoderLayer` without biases in attention, over items and positions."""
    module = encoder().double().eval()
    weights, width, places = module.weights(), 16, 5
    items = torch.randn(4, places, width, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(
        items + weights.position, (width,), weights.gain, weights.bias, EPS
    )
    hidden = (torch.arange(places)[:, None] < torch.arange(places)) | ~MASK[:, None, :]
    hidden &= ~torch.eye(places, dtype=torch.bool)
    x = normed
    for block in weights.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            width, module.heads, 4 * width, dropout=0.0, layer_norm_eps=EPS, batch_first=True
        ).double()
        state = {
            "self_attn.in_proj_weight": torch.cat(block[:3]),
            "self_attn.in_proj_bias": torch.zeros(3 * width),
            "self_attn.out_proj.weight": block.out,
            "self_attn.out_proj.bias": torch.zeros(width),
            "norm1.weight": block.attention_gain,
            "norm1.bias": block.attention_bias,
            "linear1.weight": block.widen,
            "linear1.bias": block.widen_bias,
            "linear2.weight": block.narrow,
            "linear2.bias": block.narrow_bias,
            "norm2.weight": block.forward_gain,
            "norm2.bias": block.forward_bias,
        }
        layer.load_state_dict(state)
        x = layer(x, src_mask=hidden.repeat_interleave(module.heads, dim=0))
    have = sequence_encoder_reference(items, MASK, weights, module.heads)
    torch.testing.assert_close(have[MASK], x[MASK], rtol=1e-12, atol=1e-12)
    assert not have[~MASK].any()


def test_the_model_s_eager_is_the_reference():
    module = encoder(dropout=0.3)
    items = torch.randn(4, 5, 16)
    for training in (False, True):
        module.train(training)
        torch.manual_seed(9)
        have = module(items, MASK, backend="eager")
        torch.manual_seed(9)
        dropout = 0.3 if training else 0.0
        want = sequence_encoder_reference(items, MASK, module.weights(), module.heads, dropout=dropout)
        assert torch.equal(have, want)


def test_mask_is_philox():
    """Counter and key of all ones and of π's digits: the known answers of Random123's test vectors."""

    def philox(counter, key):
        for _ in range(10):
            p, q = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [
                (q >> 32) ^ counter[1] ^ key[0],
                q & 0xFFFFFFFF,
                (p >> 32) ^ counter[3] ^ key[1],
                p & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter

    ones = philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2)
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    digits = philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert digits == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    key = [int(SEED) & 0xFFFFFFFF, (int(SEED) >> 32) & 0xFFFFFFFF]
    mask = dropout_mask(SEED, 5, 3, 150, 0.3)
    for place, column in itertools.product(range(3), range(150)):
        word = philox([column // 64 * 16 + column % 16, place, 5, 0], key)[column % 64 // 16]
        assert bool(mask[place, column]) == (word >= round(0.3 * 2**32))


def test_mask_statistics():
    """Rates, and correlations between columns, places, sites and steps, within five standard errors."""
    p, places, columns = 0.2, 2000, 64
    count = places * columns
    masks = [
        dropout_mask(torch.tensor(seed), site, places, columns, p).double()
        for seed, site in ((1, 0), (1, 1), (2, 0))
    ]
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
        assert (mask.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / places) ** 0.5

    def correlation(a, b):
        return ((a - (1 - p)) * (b - (1 - p))).mean() / (p * (1 - p))

    base = masks[0]
    pairs = [*itertools.combinations(masks, 2), (base[1:], base[:-1]), (base[:, 1:], base[:, :-1])]
    pairs += [(base[:, 16:], base[:, :-16])]
    assert all(abs(correlation(a, b)) < 5 * a.numel() ** -0.5 for a, b in pairs)


def test_reference_gradients():
    items, mask, flat = problem()

    def call(items, *flat):
        return sequence_encoder_reference(items, mask, grouped(flat), 2, dropout=0.3, seed=SEED)

    leaves = [t.requires_grad_() for t in (items, *flat)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": torch.ones(4, 2).bool()}, ValueError, r"mask: expected \[4, 3\]"),
        ({"mask": torch.ones(4, 3)}, TypeError, r"mask: expected dtype bool, got float32"),
        ({"items": torch.randn(4, 3, 5)}, ValueError, r"items: expected shape \[\?, \?, 6\]"),
        ({"items": torch.randn(4, 9, 6), "mask": torch.ones(4, 9).bool()}, ValueError, r"items: .* 5 places"),
        ({"heads": 4}, ValueError, r"heads: expected a divisor of the width 6, got 4"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"seed": torch.tensor([1])}, ValueError, r"seed: expected shape \[\]"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    items, mask, flat = problem(dtype=torch.float32)
    arguments = {"items": items, "mask": mask, "weights": grouped(flat), "heads": 2, **changes}
    with pytest.raises(error, match=message):
        sequence_encoder(**arguments)


def test_a_weight_of_the_wrong_shape_is_named():
    items, mask, flat = problem()
    flat[9] = torch.randn(3, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"blocks\[0\].widen: expected shape \[3, 6\], got float64 \[3, 7\]"):
        sequence_encoder(items, mask, grouped(flat), 2)
