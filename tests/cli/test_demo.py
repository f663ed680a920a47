"""The demo end to end: what it promises about popularity and about each modality, on three seeds."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest

from crossan_fast.cli import demo, main


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
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


def test_it_ends_by_naming_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"popularity": {"hr@10": 0.1}, "text": {"hr@10": 0.2}}
    drawn: list[Path] = []
    monkeypatch.setattr(demo, "demo", lambda out, **options: rows)
    monkeypatch.setattr(demo, "_plot", lambda *given: None)
    monkeypatch.setattr(
        demo, "draw_run", lambda run: drawn.append(run) or [run / "map.png", run / "report.html"]
    )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert drawn == [tmp_path / "runs" / "text+image+video+audio"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{drawn[0] / 'report.html'}: ")


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "--out: expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_what_is_missing_is_said_before_anything_is_made(monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    assert main(["demo", "--out", str(tmp_path / "shop")]) == 2
    assert "demo needs matplotlib: pip install 'crossan-fast[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()
