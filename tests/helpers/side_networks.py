"""Side networks of every structure for the tests of its kernels: weights, states, results and gradients."""

from __future__ import annotations

import torch
from judging import judge_all, together
from torch import Tensor

from crossan_fast.ops import (
    SideNetworkStructure,
    SideNetworkWeights,
    side_network,
    side_network_reference,
)

SINGLES = ((0,), (1,), (2,))
PAIRS = (*SINGLES, (0, 1), (1, 2), (0, 2))
STRUCTURES = {
    "backbone": SideNetworkStructure((20, 20, 20), SINGLES, "backbone"),
    "side": SideNetworkStructure((20, 20, 20), SINGLES, "side"),
    "none, relu": SideNetworkStructure((70,), ((0,),), "none", "relu"),
    "unequal widths": SideNetworkStructure((20, 33, 20), SINGLES, "backbone", temperature=0.3),
    "unequal widths, side": SideNetworkStructure((33, 20, 33), SINGLES, "side"),
    "low rank": SideNetworkStructure((20, 33, 20), SINGLES, cross_projection="low_rank"),
    "low rank, side": SideNetworkStructure((20, 33, 20), SINGLES, "side", cross_projection="low_rank"),
    "pairs": SideNetworkStructure((20, 33, 20), PAIRS, "none", "relu"),
    "pairs and crosses": SideNetworkStructure((20, 33, 20), PAIRS, "side"),
}


def make_weights(
    structure: SideNetworkStructure, levels: int, rank: int, embedding: int = 10
) -> SideNetworkWeights:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.requires_grad_()

    widths, crosses = structure.tower_widths, structure.cross_pairs
    wide = [max(structure.widths[m] for m in structure.sources[t]) for t in structure.narrowed_towers]
    narrow = [widths[t] for t in structure.narrowed_towers]
    return SideNetworkWeights(
        down_weight=[normal(levels, rank, d, scale=d**-0.5) for d in widths],
        down_bias=[normal(levels, rank, scale=0.1) for _ in widths],
        up_weight=[normal(levels, d, rank, scale=rank**-0.5) for d in widths],
        up_bias=[normal(levels, d, scale=0.1) for d in widths],
        gate=[normal(levels, scale=0.05) for _ in widths],
        head_weight=[normal(embedding, d, scale=d**-0.5) for d in widths],
        head_bias=[normal(embedding, scale=0.1) for _ in widths],
        cross_gate=[normal(levels, scale=0.3) for _ in crosses],
        cross_down=[normal(rank, structure.widths[n], scale=0.1) for _, n in structure.projected_pairs],
        cross_up=[normal(structure.widths[m], rank, scale=0.3) for m, _ in structure.projected_pairs],
        pair_weight=[normal(levels, d, e, scale=0.1) for d, e in zip(narrow, wide, strict=True)],
        pair_bias=[normal(levels, d, scale=0.1) for d in narrow],
    )


def make_states(structure: SideNetworkStructure, rows: int, levels: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, levels, d, generator=generator, dtype=torch.float64) for d in structure.widths]


def in_dtype(weights: SideNetworkWeights, dtype: torch.dtype) -> SideNetworkWeights:
    return SideNetworkWeights(*([w.detach().to(dtype).requires_grad_() for w in group] for group in weights))


def outputs_and_grads(op, states, weights, structure, **arguments) -> list[Tensor]:
    """e, then the gradients of all weights."""
    e = op(states, weights, structure, **arguments)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(e.shape, generator=generator, dtype=torch.float64).to(e.dtype)
    # A projection that no level reads has no path to e: None from autograd, zeros from the kernels.
    grads = torch.autograd.grad(e, weights.flatten(), grad, allow_unused=True, materialize_grads=True)
    return [e.detach(), *grads]


def compiled(*args, **kwargs) -> Tensor:
    return side_network(*args, backend="cpp", **kwargs)


def assert_no_worse_than_eager(states, weights, structure, draws: int = 1):
    """Gates are a few scalars, whose error is one throw of the dice: `draws` of states are taken together."""
    dtype, exact = weights.gate[0].dtype, in_dtype(weights, torch.float64)
    drawn = [[s.roll(draw, dims=1) for s in states] for draw in range(draws)]
    got = [outputs_and_grads(compiled, states, weights, structure) for states in drawn]
    assert all(x.dtype == dtype for results in got for x in results)

    def plain(weights, dtype=None):
        return together(
            outputs_and_grads(side_network_reference, [s.to(dtype) for s in states], weights, structure)
            for states in drawn
        )

    truth = plain(exact, torch.float64)
    judge_all(range(len(truth)), together(got), lambda: plain(weights), truth)
