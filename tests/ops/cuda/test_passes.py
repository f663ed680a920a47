"""side_network's forward by Triton, its backward by csrc/cuda: the pair keeps what either would.

Triton runs in its interpreter, csrc/cuda on the emulator; judged as each backend is by itself.
"""

from __future__ import annotations

import os

import pytest
import torch
from cuda_side_network import HOPPER, MMA, Case, by_passes

from crossan_fast.kernels import side_network as triton_kernels
from crossan_fast.ops import _dispatch
from crossan_fast.ops._dispatch import Implementation

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="Triton's interpreter is off: test_gpu.py has the pair"
)

CASES = {
    "crosses": Case(items=37, widths=(64, 64), levels=2, rank=16),
    "missing": Case(items=37, widths=(64, 64), levels=2, presence=True),
    "iisan": Case(
        items=19,
        widths=(64, 64),
        levels=2,
        rank=16,
        cross="none",
        pairs=True,
        activation="relu",
        presence=True,
    ),
    "int8": Case(items=21, widths=(64,), levels=3, rank=16, stored=torch.int8),
}


@pytest.fixture(params=[MMA, HOPPER], ids=["mma", "hopper"])
def path(request, emulate):
    emulate(architecture=80 if request.param == MMA else 90, shared=227 * 1024)
    return request.param


@pytest.fixture
def planted(ops, path, monkeypatch):
    """csrc/cuda's emulated kernels in the place of the compiled ones, which a path is asked of."""
    cuda = Implementation(
        lambda *arguments: ops.side_network(*arguments, path, 0),
        lambda *arguments: ops.side_network_backward(*arguments, path, 0),
    )
    triton = Implementation(triton_kernels.forward, triton_kernels.backward)
    monkeypatch.setattr(_dispatch, "_find", lambda op, backend: {"cuda": cuda, "triton": triton}[backend])


@pytest.mark.parametrize("name", CASES)
def test_triton_forward_and_cuda_backward(path, planted, name):
    CASES[name].check(by_passes("triton", "cuda"), path, draws=2)


def test_cuda_forward_and_triton_backward(path, planted):
    CASES["missing"].check(by_passes("cuda", "triton"), path, draws=2)


def test_both_passes_are_those_that_were_asked_for(path, planted):
    """Else the pair would be judged by one backend's own."""
    case = CASES["crosses"]
    alone = {name: case.run(by_passes(name, name), path) for name in ("triton", "cuda")}
    e, saved, grads = case.run(by_passes("triton", "cuda"), path)
    assert torch.equal(e, alone["triton"][0]) and torch.equal(saved, alone["triton"][1])
    assert not all(map(torch.equal, grads, alone["triton"][2]))
