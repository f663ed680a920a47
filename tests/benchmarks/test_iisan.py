"""IISAN's public code as a peer of the step; the tests of the code itself need the user's own clone."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import _iisan, step
from benchmarks.registry import CheckFailed, Setting, Unavailable

CPU = torch.device("cpu")
needs_clone = pytest.mark.skipif(
    not os.environ.get(_iisan.VARIABLE),
    reason=f"{_iisan.VARIABLE} gives no clone of github.com/GAIR-Lab/IISAN",
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(step, "CATALOGUE", 300)
    drawn = step.random_sequences
    monkeypatch.setattr(step, "random_sequences", lambda users, *rest: drawn(8, *rest))


def built(architecture="iisan", dtype=torch.float32):
    return step.build_pair(architecture, Setting(CPU, dtype))


@pytest.mark.parametrize("architecture", ["iisan", "crossan"])
def test_without_a_clone_the_peer_is_skipped_and_says_what_it_needs(monkeypatch, tmp_path, architecture):
    make = built(architecture).implementations["iisan"]
    needed = r"CROSSAN_FAST_IISAN is not set, expected the path of a clone of github\.com/GAIR-Lab/IISAN"
    monkeypatch.delenv(_iisan.VARIABLE, raising=False)
    with pytest.raises(Unavailable, match=needed):
        make()
    monkeypatch.setenv(_iisan.VARIABLE, str(tmp_path))
    with pytest.raises(Unavailable, match=r"CROSSAN_FAST_IISAN: expected .*model\.py is no file"):
        make()
    with pytest.raises(Unavailable, match="fp32 alone"):
        built(architecture, torch.bfloat16).implementations["iisan"]()


def test_a_clone_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    package = tmp_path / "Code_Cached" / "model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import no_such_package_anywhere\n")
    (package / "model.py").touch()
    monkeypatch.setenv(_iisan.VARIABLE, str(tmp_path))
    with pytest.raises(Unavailable, match="can't be imported: No module named 'no_such_package_anywhere'"):
        _iisan.load()


@needs_clone
@pytest.mark.parametrize("architecture", ["iisan", "crossan"])
def test_the_public_code_computes_what_ours_does(architecture):
    workload = built(architecture)
    runnable = workload.implementations["iisan"]()
    workload.check("iisan", runnable)
    samples = timing.interleaved({"iisan": runnable}, CPU, workload.sets, 0.0, 5)["iisan"]
    assert len(samples.passes["run"]) == 5
    losses = [float(runnable.forward(0)[0]) for _ in range(40)]
    assert losses[-1] < losses[0]


@needs_clone
def test_a_public_step_that_differs_has_no_speed(monkeypatch):
    made = []
    whole = _iisan.PublicIisan.__init__
    monkeypatch.setattr(
        _iisan.PublicIisan, "__init__", lambda self, bench: made.append(self) or whole(self, bench)
    )
    workload = built()
    runnable = workload.implementations["iisan"]()
    (peer,) = made
    assert sum(p.numel() for p in peer.model.parameters()) == 4_113_877
    hook = peer.model.com_dense.weight.register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(CheckFailed, match=r"iisan: gradient of fusion\.weight errs by"):
        workload.check("iisan", runnable)
    hook.remove()
    peer.model.com_dense.bias.requires_grad_(False)
    with pytest.raises(CheckFailed, match="iisan: 4,113,813 trained parameters, expected 4,113,877"):
        workload.check("iisan", runnable)
    peer.model.com_dense.bias.requires_grad_(True)
    peer.model.pop_prob_list[5:9] *= 2
    with pytest.raises(CheckFailed, match="iisan: loss errs by"):
        workload.check("iisan", runnable)
