"""Free host memory within a control group, by files laid out as Linux does."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossan_fast.cache.tiers import host_memory

MIB = 1 << 20


def test_pages_of_files_count_as_free_within_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossan_fast.cache.tiers._CGROUP", tmp_path)
    whole = host_memory()
    assert whole > 64 * MIB
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{60 * MIB}\n")
    assert host_memory() == 4 * MIB
    stat = {"anon": 20 * MIB, "file": 40 * MIB, "inactive_file": 25 * MIB, "active_file": 10 * MIB}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in stat.items()))
    assert host_memory() == 39 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() > 64 * MIB
