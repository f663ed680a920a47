"""The demo end to end: what it promises about popularity and about each modality, on three seeds."""

from __future__ import annotations

from itertools import pairwise

import pytest

from crossan_fast.cli import demo, main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_modality_adds_and_all_beat_popularity_threefold(seed, tmp_path):
    said: list[str] = []
    rows = demo.demo(tmp_path / "demo", seed=seed, say=said.append)
    assert list(rows) == ["popularity", "text", "+ image", "+ video", "+ audio"]
    rates = [row["hr@10"] for row in rows.values()]
    assert all(more > fewer for fewer, more in pairwise(rates[1:]))
    assert rates[-1] >= 3 * rates[0]
    demo._plot(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert any("popularity" in line and f"{100 * rates[-1]:.2f}" in line for line in said)


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "--out: expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
