"""The opt-in search: off by default, one search a key, results on disk and never stale."""

from __future__ import annotations

import json

import pytest

from crossan_fast.kernels import _autotune

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


def test_other_sources_or_versions_search_again(search, monkeypatch):
    search()
    monkeypatch.setattr(_autotune, "_found", {})
    monkeypatch.setattr(_autotune, "_versions", lambda: "another")
    search()
    assert len(search.runs) == 6


def test_a_broken_file_is_named(search):
    _autotune.path().parent.mkdir()
    _autotune.path().write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json.*remove it"):
        search()
