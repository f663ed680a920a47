"""Fixtures that the tests of several ops share."""

from __future__ import annotations

import pytest

from crossan_fast.ops import _score_tiles


@pytest.fixture(params=[4096, 7], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    """The plain rankings walk the catalogue in one tile, and in many."""
    monkeypatch.setattr(_score_tiles, "TILE", request.param)
