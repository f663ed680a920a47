"""Kernels' scratch has types of its own, whatever `torch.set_default_dtype` says: the same bits."""

from __future__ import annotations

import pytest
import torch
from side_networks import STRUCTURES, in_dtype, make_states, make_weights

from crossan_fast.kernels import batch_rows, side_network

DEFAULTS = [torch.bfloat16, torch.float64]


@pytest.fixture(params=DEFAULTS, ids=str)
def in_default(request):
    """`in_default(work)`: what `work()` gives where this is torch's default dtype."""

    def run(work):
        torch.set_default_dtype(request.param)
        try:
            return work()
        finally:
            torch.set_default_dtype(torch.float32)

    return run


@pytest.mark.parametrize("name", ["none, relu", "side"])
def test_side_network(name, in_default, device):
    structure = STRUCTURES[name]
    flat = in_dtype(make_weights(structure, 2, 5), torch.float32).flatten()
    weights = [weight.detach().to(device) for weight in flat]
    states = [state.float().to(device) for state in make_states(structure, 4, 2)]
    rest = (states, [], None, None, weights, *structure.static, torch.float32)
    grad = torch.randn(4, len(structure.sources), 10, device=device)

    def work():
        e, saved, links = side_network.forward(*rest)
        return [e, saved, links, *side_network.backward(grad, saved, links, *rest)]

    for got, want in zip(in_default(work), work(), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_batch_rows_of_more_places_than_are_looked_through(in_default, device):
    slots = torch.randint(0, 7, (batch_rows.MOST // 2, 3), device=device)
    grads = torch.randn(7, 3), torch.randn(len(slots), 2, 3), torch.randn(len(slots), 3, 3)
    grads = [grad.to(device) for grad in grads]

    def work():
        return batch_rows.backward(*grads, slots, 7, 3, torch.float32)

    got, want = in_default(work), work()
    assert got.dtype == want.dtype and torch.equal(got, want)
