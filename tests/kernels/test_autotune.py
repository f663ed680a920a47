"""The opt-in search: off by default, one search a key, results on disk and never stale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from crossan_fast.kernels import (
    _autotune,
    full_loss,
    fusion,
    in_batch_loss,
    rank_of_target,
    side_network,
    topk_scores,
)
from crossan_fast.ops.side_network import SideNetworkStructure, SideNetworkWeights

# The interpreter computes on the CPU; with TRITON_INTERPRET=0 the very same tests run on a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

COST = {"slow": 3.0, "fast": 1.0, "middling": 2.0}
CANDIDATES = ("slow", "fast", "middling")


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Calls `tuned` with a clock of its own; `search.runs` lists the configs that were timed."""
    monkeypatch.setenv("CROSSAN_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("CROSSAN_FAST_AUTOTUNE_FILE", str(tmp_path / "folder" / "tuned.json"))
    monkeypatch.setattr(_autotune, "_found", {})
    runs: list[str] = []

    def call(key=("device", 768), candidates=CANDIDATES):
        def clock(function):
            function()
            return COST[runs[-1]]

        return _autotune.tuned("op", key, candidates, runs.append, clock)

    call.runs = runs
    return call


def test_off_by_default(search, monkeypatch):
    monkeypatch.delenv("CROSSAN_FAST_AUTOTUNE")
    assert search() == "slow" and search.runs == []


def test_fastest_is_kept_for_its_key(search, monkeypatch):
    assert search() == "fast" and search() == "fast"
    assert search.runs == list(CANDIDATES)
    monkeypatch.setattr(_autotune, "_found", {})  # another process
    assert search() == "fast" and len(search.runs) == 3
    search(key=("device", 1024))
    search(candidates=("slow", "middling"))
    assert len(search.runs) == 3 + 3 + 2 and len(json.loads(_autotune.path().read_text())) == 3


def test_a_config_that_the_device_has_no_room_for_is_passed_over(search, monkeypatch):
    def clock(function):
        function()
        if runs[-1] != "middling":
            raise OutOfResources(300_000, 232_448, "shared memory")
        return COST[runs[-1]]

    runs: list[str] = []
    found = [
        _autotune.tuned("op", (key,), CANDIDATES[:n], runs.append, clock)
        for key, n in (("all", 3), ("none", 2))
    ]
    assert found == ["middling", "slow"] and runs == [*CANDIDATES, "slow", "fast"]


def test_other_sources_or_versions_search_again(search, monkeypatch):
    search()
    monkeypatch.setattr(_autotune, "_found", {})
    monkeypatch.setattr(_autotune, "_versions", lambda: "another")
    search()
    assert len(search.runs) == 6


def test_every_source_file_is_part_of_the_version(monkeypatch, tmp_path):
    assert Path(_autotune.__file__).parent == _autotune._SOURCES
    monkeypatch.setattr(_autotune, "_SOURCES", tmp_path)
    (tmp_path / "op").mkdir()
    versions = set()
    for name in ("_blocks.py", "op/host.py"):
        for text in ("one", "another"):
            (tmp_path / name).write_text(text)
            versions.add(_autotune._versions.__wrapped__())
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "expected an object of choices, got list"),
        ('{"op": 1.5}', "expected a candidate's number at 'op', got 1.5"),
        ('{"op": true}', "got True"),
        ('{"op": -1}', "got -1"),
        ('{"op": ' + "9" * 40 + "}", "got 9999"),
        (" " * (_autotune.MAX_BYTES + 1), "at most"),
    ],
    ids=lambda value: value[:12],
)
def test_a_broken_file_is_named(search, content, problem):
    _autotune.path().parent.mkdir()
    _autotune.path().write_text(content)
    with pytest.raises(ValueError, match=r"CROSSAN_FAST_AUTOTUNE_FILE: .*tuned\.json") as raised:
        search()
    assert problem in str(raised.value)


def test_a_choice_that_no_candidate_has_is_named(search, monkeypatch):
    search()
    name, _ = json.loads(_autotune.path().read_text()).popitem()
    _autotune.path().write_text(json.dumps({name: len(CANDIDATES)}))
    monkeypatch.setattr(_autotune, "_found", {})
    with pytest.raises(ValueError, match=r"tuned\.json: 3 for op/.* expected less than 3"):
        search()


def _normal(*shape, seed=0):
    return (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def _network(count):
    towers, levels, rank, width = 2, 2, 16, 48
    structure = SideNetworkStructure((width,) * towers, ((0,), (1,)))
    shapes = ((levels, rank, width), (levels, rank), (levels, width, rank), (levels, width), (levels,))
    shapes += ((8, width), (8,))
    groups = [[_normal(*shape, seed=i + 10 * t) for t in range(towers)] for i, shape in enumerate(shapes)]
    weights = SideNetworkWeights(*groups, cross_gate=[_normal(levels, seed=90 + i) for i in range(2)])
    states = [_normal(9, levels, width, seed=50 + t) for t in range(towers)]
    ids = torch.arange(count, device=DEVICE) % 9
    rest = (states, [], ids, None, weights.flatten(), *structure.static, torch.float32)
    e, saved, links = side_network.forward(*rest)
    grad = _normal(count, towers, 8, seed=70)
    return [e, saved, *side_network.backward(grad, saved, links, *rest)]


def _fusion(count):
    m, d = 2, 16
    shapes = ((m, m * d), (m,), (m, 4 * d, d), (m, 4 * d), (m, d, 4 * d), (m, d))
    weights = [_normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    call = (_normal(count, m, d, seed=40), weights, None, None, None, torch.float32)
    items, _, probability, logits = fusion.forward(*call)
    return [items, probability, *fusion.backward(items, probability, logits, *call)]


def _full_loss(count):
    rest = _normal(count, 8), _normal(20, 8, seed=1), torch.arange(count, device=DEVICE)
    loss, lse = full_loss.forward(*rest)
    return [loss, lse, *full_loss.backward(loss, lse, *rest)]


def _in_batch_loss(count):
    slots = torch.arange(count * 3, device=DEVICE).view(count, 3) % 7
    rest = (_normal(count, 2, 8), _normal(7, 8, seed=1), slots, slots.new_ones(7), _normal(7, seed=2))
    loss, lse = in_batch_loss.forward(*rest)
    return [loss, lse, *in_batch_loss.backward(loss, lse, *rest)]


def _topk(count):
    return list(topk_scores.forward(_normal(count, 8), _normal(30, 8, seed=1), 5))


def _rank(count):
    targets = torch.arange(1, count + 1, device=DEVICE)
    return [rank_of_target.forward(_normal(count, 8), _normal(30, 8, seed=1), targets)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("call", "ops"),
    [
        pytest.param(_network, {"side_network", "side_network_backward"}, id="side_network"),
        pytest.param(_fusion, {"fusion_forward", "fusion_backward"}, id="fusion"),
        pytest.param(_full_loss, {"loss"}, id="full_loss"),
        pytest.param(_in_batch_loss, {"loss"}, id="in_batch_loss"),
        pytest.param(_topk, {"topk_scores"}, id="topk_scores"),
        pytest.param(_rank, {"rank_of_target"}, id="rank_of_target"),
    ],
)
def test_every_op_searches_once_a_bucket_and_computes_the_same(call, ops, search, monkeypatch):
    """A clock that likes the last candidate best: what is computed with it agrees with the default's."""
    timed = []

    def clock(function, **_):
        function()
        timed.append(function)
        return -len(timed)

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    monkeypatch.delenv("CROSSAN_FAST_AUTOTUNE")
    default = call(7)
    assert not timed
    monkeypatch.setenv("CROSSAN_FAST_AUTOTUNE", "1")
    for got, want in zip(call(7), default, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found = json.loads(_autotune.path().read_text())
    assert {name.split("/")[0] for name in found} == ops
    assert all(choice > 0 for choice in found.values())
    searched = len(timed)
    call(5), call(8)
    assert len(timed) == searched, "another size of the same bucket searched again"
