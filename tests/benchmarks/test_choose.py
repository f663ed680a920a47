"""Measured rows say which backend runs each pass on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import choose, results
from benchmarks.__main__ import main
from benchmarks.results import Row
from crossan_fast.ops import _passes

GPU = "NVIDIA Some GPU"
RUN = ("abc1234567", "2026-01-01T00:00Z", "Some CPU, 2 cores", 2, "2.11", "3.6")
ROW = Row(*RUN, "fusion/N=1", "cpp", "fp32", "both", 20, 9.0, 9.0, 9.0, None, None, None, 25.0, 0.3)
TIMES = {  # ms at 704 and 20,314 items
    ("triton-graph", "forward"): (0.1, 1.0),
    ("triton-graph", "backward"): (0.2, 4.0),
    ("cuda-graph", "forward"): (0.09, 1.2),
    ("cuda-graph", "backward"): (0.1, 1.0),
}
ROWS = [
    replace(ROW, device=GPU, case=case, backend=backend, dtype="bf16", passes=passes, p50_ms=ms)
    for (backend, passes), times in TIMES.items()
    for case, ms in zip(choose.CASES["side_network"], times, strict=True)
]


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    monkeypatch.setattr(_passes, "TABLE", tmp_path / "gpu_passes.json")
    _passes.table.cache_clear()
    yield
    _passes.table.cache_clear()


def test_the_faster_over_both_sizes_is_taken_for_each_pass(tmp_path, capsys):
    path = tmp_path / "nvidia.csv"
    results.append(path, ROWS)
    results.append(tmp_path / "cpu.csv", [ROW])
    assert main(["choose", str(path), str(tmp_path / "cpu.csv")]) == 0
    assert f"{GPU}: side_network: forward triton, backward cuda" in capsys.readouterr().out
    _passes.table.cache_clear()
    passes = _passes.table()[GPU]["side_network"]
    assert (passes.forward, passes.backward) == ("triton", "cuda")
    assert "backward triton 0.2 and 4, cuda 0.1 and 1" in passes.reason and ROW.commit in passes.reason


def test_the_captured_call_counts_and_a_plain_one_where_it_was_not_captured():
    rows = [replace(row, backend=row.backend.removesuffix("-graph"), p50_ms=9.0) for row in ROWS]
    assert choose.decide("side_network", results.latest([*rows, *ROWS])).backward == "cuda"
    assert choose.decide("side_network", results.latest(rows)).backward == "triton", "a tie"


def test_what_a_decision_lacks_is_named(tmp_path, capsys):
    results.append(tmp_path / "cpu.csv", [ROW])
    assert main(["choose", str(tmp_path / "cpu.csv")]) == 2
    assert "rows of a GPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"N=20314.* bf16 cuda backward, got none"):
        choose.decide("side_network", results.latest(ROWS[:-1]))
    with pytest.raises(ValueError, match="rows of one commit"):
        choose.decide("side_network", results.latest([*ROWS[:-1], replace(ROWS[-1], commit="other")]))
