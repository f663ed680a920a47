"""The plain MOMEF against a second implementation that fuses one item at a time in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crossan_fast.ops import FusionWeights, fusion, fusion_reference

N, M, D, F = 7, 3, 4, 6


def make_weights():
    def r(*shape):
        return torch.randn(*shape, dtype=torch.float64) * 0.5

    return FusionWeights(r(M, M * D), r(M), r(M, F, D), r(M, F), r(M, D, F), r(M, D))


def make_embeddings():
    return torch.randn(N, M, D, dtype=torch.float64)


def by_hand(embeddings, w, present, top_k, counts):
    items, chosen_total, probability_total, total = [], np.zeros(M), np.zeros(M), 0
    for i in range(N):
        here = [m for m in range(M) if present[i, m]]
        if not here:
            items.append(np.zeros(D))
            continue
        e = np.zeros((M, D))
        for m in here:
            e[m] = embeddings[i, m].numpy()
        logits = w.router_weight.numpy() @ e.reshape(-1) + w.router_bias.numpy()
        top = max(logits[m] for m in here)
        exp = {m: math.exp(logits[m] - top) for m in here}
        p = {m: exp[m] / sum(exp.values()) for m in here}
        chosen = sorted(here, key=lambda m: (-p[m], m))[: top_k or M]
        item = np.zeros(D)
        for m in chosen:
            inner = w.w1[m].numpy() @ e[m] + w.b1[m].numpy()
            inner = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in inner])
            expert = e[m] + w.w2[m].numpy() @ inner + w.b2[m].numpy()
            item += p[m] / sum(p[n] for n in chosen) * expert
        items.append(item)
        total += counts[i]
        for m in sorted(here, key=lambda m: (-p[m], m))[: top_k or 1]:
            chosen_total[m] += counts[i]
        for m in here:
            probability_total[m] += counts[i] * p[m]
    balance = M * (chosen_total / chosen_total.sum() * probability_total / total).sum()
    return np.stack(items), balance


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_reference_equals_the_definition_item_by_item(top_k, missing):
    embeddings, weights = make_embeddings(), make_weights()
    present = torch.rand(N, M) > 0.4 if missing else None
    if present is not None:
        present[0], present[1] = False, True
    counts = torch.tensor([1, 3, 0, 2, 1, 1, 5])
    out = fusion_reference(embeddings, weights, present=present, top_k=top_k, counts=counts)
    everyone = torch.ones(N, M).bool() if present is None else present
    items, balance = by_hand(embeddings, weights, everyone, top_k, counts.tolist())
    np.testing.assert_allclose(out.items.numpy(), items, rtol=1e-10, atol=1e-12)
    assert float(out.balance) == pytest.approx(balance, rel=1e-10)


def test_counts_equal_repetition():
    embeddings, weights = make_embeddings(), make_weights()
    counts = torch.tensor([1, 3, 0, 2, 1, 1, 5])
    repeated = embeddings.repeat_interleave(counts, 0)
    once = fusion_reference(embeddings, weights, counts=counts).balance
    assert float(once) == pytest.approx(float(fusion_reference(repeated, weights).balance), rel=1e-12)


def test_uniform_router_balances_at_one():
    weights = make_weights()
    weights = weights._replace(
        router_weight=torch.zeros(M, M * D, dtype=torch.float64),
        router_bias=torch.zeros(M, dtype=torch.float64),
    )
    assert float(fusion_reference(make_embeddings(), weights).balance) == pytest.approx(1.0)


def test_ties_go_to_the_first_modality():
    weights = make_weights()
    weights = weights._replace(
        router_weight=torch.zeros(M, M * D, dtype=torch.float64),
        router_bias=torch.zeros(M, dtype=torch.float64),
    )
    embeddings = make_embeddings()
    one = fusion_reference(embeddings, weights, top_k=1).items
    only_first = torch.zeros(N, M, dtype=torch.bool)
    only_first[:, 0] = True
    assert torch.allclose(one, fusion_reference(embeddings, weights, present=only_first).items)


@pytest.mark.parametrize("top_k", [None, 2])
def test_reference_gradients(top_k):
    leaves = [t.requires_grad_() for t in (make_embeddings(), *make_weights())]
    present = torch.rand(N, M) > 0.3

    def run(embeddings, *weights):
        return tuple(fusion_reference(embeddings, FusionWeights(*weights), present=present, top_k=top_k))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"embeddings": torch.ones(N, D)},
            ValueError,
            r"embeddings: expected shape \[\?, 3, 4\], got float32 \[7, 4\]",
        ),
        ({"embeddings": torch.ones(N, 2, D)}, ValueError, r"embeddings: expected shape \[\?, 3, 4\]"),
        ({"top_k": 4}, ValueError, r"top_k: expected an integer from 1 to 3, got 4"),
        ({"present": torch.ones(N, 2).bool()}, ValueError, r"present: expected shape \[\?, 3\]"),
        ({"counts": torch.ones(2, dtype=torch.int64)}, ValueError, r"counts: expected 7 rows"),
        ({"counts": torch.ones(N)}, TypeError, r"counts: expected dtype int64, got float32"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        fusion(**{"embeddings": make_embeddings(), "weights": make_weights(), **changes})
