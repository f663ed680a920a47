"""Rows beyond the 2^31st element of a cache: addresses are 64 bits wide in every kernel that gathers.

The cache is a sparse file mapped into memory: 2^32 elements and more that take no memory, of which only a few
rows at the far end are ever written or read. A 32-bit offset would wrap around to the near end, where all is
zero.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from crossan_fast.kernels import side_network
from crossan_fast.kernels._blocks import load_block
from crossan_fast.kernels.fusion.forward_kernels import load_embedding, load_tile
from crossan_fast.kernels.side_network import forward_launch, plan
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights

WIDTH, LEVELS, NEAR = 32, 2, 6
ROWS = 2**32 // (WIDTH * LEVELS) + 40


@pytest.fixture
def far(tmp_path, device):
    """int8 `[ROWS, LEVELS, WIDTH]` in a sparse file, zero but for its last rows, and those rows alone."""
    if device.type != "cpu":
        pytest.skip("maps a file: for the interpreter on CPU tensors")
    size = ROWS * LEVELS * WIDTH
    cache = torch.from_file(str(tmp_path / "cache"), shared=True, size=size, dtype=torch.int8)
    cache = cache.view(ROWS, LEVELS, WIDTH)
    near = torch.randint(-100, 100, (NEAR, LEVELS, WIDTH), dtype=torch.int8)
    cache[-NEAR:] = near
    assert (tmp_path / "cache").stat().st_blocks * 512 < 2**20, "the file is not sparse"
    assert (ROWS - NEAR) * LEVELS * WIDTH > 2**32
    return cache, near


@pytest.mark.sweep(1)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_side_network_gathers_far_rows(fused, ids_dtype, far, monkeypatch):
    """*fused* or *down*, and *down_gradient*: the same bits as from a cache that holds those rows alone."""
    choose = plan.forward_config

    def forced(problem):
        tiles = {"columns": 16, "span": 16, "splits": 1 if fused else 2}
        return replace(choose(problem), fused=fused, levels=problem.levels, **tiles)

    monkeypatch.setattr(plan, "forward_config", forced)
    monkeypatch.setattr(forward_launch, "forward_candidates", lambda problem: [forced(problem)])
    rank, (cache, near) = 16, far
    structure = SideNetworkStructure((WIDTH, WIDTH), ((0,), (1,)))
    shapes = ((LEVELS, rank, WIDTH), (LEVELS, rank), (LEVELS, WIDTH, rank), (LEVELS, WIDTH), (LEVELS,))
    shapes += ((12, WIDTH), (12,))
    groups = [[0.2 * torch.randn(shape) for _ in range(2)] for shape in shapes]
    weights = SideNetworkWeights(*groups, cross_gate=[torch.randn(LEVELS) for _ in range(2)])
    ids = torch.tensor([3, 0, 5, 5, 1, 2], dtype=ids_dtype)
    grad = torch.randn(len(ids), 2, 12)

    def run(states, ids):
        rest = ([states, states], [], ids, None, weights.flatten(), *structure.static, torch.float32)
        e, saved, links = side_network.forward(*rest)
        return [e, saved, *side_network.backward(grad, saved, links, *rest)]

    for got, want in zip(run(cache, ids + ROWS - NEAR), run(near, ids), strict=True):
        assert want.any()
        assert torch.equal(got, want)


@triton.jit
def copy_kernel(matrix, index, out, rows, N: tl.constexpr, D: tl.constexpr, BY: tl.constexpr):
    """Rows `index` of a matrix, by the helper that losses and rankings use, or by one of fusion's."""
    row = tl.load(index + tl.arange(0, N))
    column = tl.arange(0, D)
    if BY == "load_tile":
        block = load_tile(matrix, row, rows, column, D, D)
    elif BY == "load_embedding":
        block = load_embedding(matrix, None, row, rows, 0, column, 1, D, tl.int8)
    else:
        block = load_block(matrix, row, rows, D, D)
    tl.store(out + tl.arange(0, N)[:, None] * D + column[None, :], block)


@pytest.mark.parametrize("by", ["load_block", "load_tile", "load_embedding"])
def test_blocks_of_rows_are_read_far_off(by, far):
    """Every other kernel reads rows by these: users, items, targets, embeddings, logits, gradients."""
    cache, near = (x.flatten(1) for x in far)
    index = torch.tensor([ROWS - 1, ROWS - 4, ROWS - 6, ROWS - 2], dtype=torch.int32)
    out = torch.zeros(4, WIDTH * LEVELS, dtype=torch.int8)
    copy_kernel[(1,)](cache, index, out, ROWS, N=4, D=WIDTH * LEVELS, BY=by)
    assert torch.equal(out, near[[5, 2, 0, 4]])
