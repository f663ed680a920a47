"""The sequence encoder: what masks must hide, and packed attention against the dense one."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanConfig, Modality
from crossan_fast.modules import sequence_encoder as module
from crossan_fast.modules.sequence_encoder import SequenceEncoder
from crossan_fast.ops import sequence_encoder_reference

WINDOW, D = 5, 8
MASK = torch.arange(WINDOW) >= torch.tensor([[0], [2], [4]])


def config(**overrides):
    return CrossanConfig([Modality("text", 4, 2)], embedding_dim=D, window=WINDOW, **overrides)


def encoder():
    return SequenceEncoder(config()).double().eval()


def test_a_place_sees_neither_later_places_nor_padding():
    encode, items = encoder(), torch.randn(3, WINDOW, D, dtype=torch.float64)
    before = encode(items, MASK)
    changed = items.clone()
    changed[:, -1] = torch.randn(3, D, dtype=torch.float64)
    after = encode(changed, MASK)
    assert torch.equal(before[:, :-1][MASK[:, :-1]], after[:, :-1][MASK[:, :-1]])
    assert not torch.allclose(before[:, -1], after[:, -1])
    noisy = torch.where(MASK[..., None], items, torch.randn_like(items))
    assert torch.equal(encode(noisy, MASK)[MASK], before[MASK])


def test_padding_gets_no_gradient_and_no_nan():
    encode = encoder()
    items = torch.randn(3, WINDOW, D, dtype=torch.float64, requires_grad=True)
    mask = MASK.clone()
    mask[0] = False  # a row of nothing but padding
    encode(items, mask)[mask].sum().backward()
    assert torch.isfinite(items.grad).all()
    assert items.grad[~mask].abs().sum() == 0


def test_short_sequences_stand_at_the_end_of_the_window():
    encode, items = encoder(), torch.randn(2, 3, D, dtype=torch.float64)
    padded = F.pad(items, (0, 0, WINDOW - 3, 0))
    mask = torch.arange(WINDOW).expand(2, -1) >= WINDOW - 3
    short = encode(items, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(short, encode(padded, mask)[:, -3:])


def fake_xformers(monkeypatch):
    """xformers' documented contract for packed causal sequences, one sequence at a time."""

    class BlockDiagonalCausalMask:
        @staticmethod
        def from_seqlens(lengths):
            return lengths

    def memory_efficient_attention(q, k, v, attn_bias, p):
        assert q.shape[0] == 1 and sum(attn_bias) == q.shape[1]
        parts = [t.split(attn_bias, dim=1) for t in (q, k, v)]
        out = [
            F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in one), is_causal=True, dropout_p=p
            ).transpose(1, 2)
            for one in zip(*parts, strict=True)
        ]
        return torch.cat(out, dim=1)

    fmha = types.SimpleNamespace(
        attn_bias=types.SimpleNamespace(BlockDiagonalCausalMask=BlockDiagonalCausalMask),
        memory_efficient_attention=memory_efficient_attention,
    )
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_packed_attention_equals_dense(monkeypatch):
    fake_xformers(monkeypatch)
    encode, items = encoder(), torch.randn(3, WINDOW, D, dtype=torch.float64)
    for mask in (MASK, MASK & False):
        dense = encode(items, mask, backend="eager")
        packed = sequence_encoder_reference(
            items, mask, encode.weights(), encode.heads, attend=module._packed
        )
        torch.testing.assert_close(packed, dense)


def test_xformers_in_the_config_is_what_attends(monkeypatch):
    fake_xformers(monkeypatch)
    encode = SequenceEncoder(config(attention="xformers", dropout=0.3))
    asked = []

    def reference(items, mask, weights, heads, *, dropout, attend):
        asked.append((heads, dropout, attend))
        return items

    monkeypatch.setattr(module, "sequence_encoder_reference", reference)
    items = types.SimpleNamespace(device=torch.device("cuda"))
    assert encode(items, MASK) is items
    assert encode.eval()(items, MASK) is items
    assert asked == [(2, 0.3, module._packed), (2, 0.0, module._packed)]


def test_xformers_needs_cuda(monkeypatch):
    fake_xformers(monkeypatch)
    encode = SequenceEncoder(config(attention="xformers"))
    with pytest.raises(ValueError, match=r"attention: 'xformers' runs on CUDA.*got cpu"):
        encode(torch.randn(3, WINDOW, D), MASK)


def test_xformers_missing_is_named():
    with pytest.raises(ImportError, match="xformers"):
        SequenceEncoder(config(attention="xformers"))
