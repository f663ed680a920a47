"""`crossan-fast recommend`, also for items that came after training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from crossan_fast.cache import HiddenStateCache
from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main


def recommend(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    assert main(["recommend", "--run", str(run), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split(maxsplit=3) for line in lines if not line.startswith("history")]


def test_names_titles_and_scores_in_order(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder / "run"
    rows = recommend(capsys, run, "--history", "b03", "b04", "b05", "--k", "4")
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(row[3] == f"Title {row[1]}" for row in rows)
    assert "b06" in [row[1] for row in rows], "what follows b05 in every history"
    assert not {"b03", "b04", "b05"} & {row[1] for row in rows}
    everything = recommend(capsys, run, "--history", "b03", "b04", "b05", "--k", "24", "--keep-history")
    assert {"b03", "b04", "b05"} < {row[1] for row in everything}
    assert main(["recommend", "--run", str(run), "--history", "b07"]) == 0
    assert "history  b07  Title b07" in capsys.readouterr().out


def test_items_appended_after_training_are_ranked(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new item that is a copy of a known one is recommended right beside it."""
    old = HiddenStateCache.open(run_folder / "cache")
    (states,) = old.states("cpu")
    best = recommend(capsys, run_folder / "run", "--history", "b03", "b04", "--k", "1")[0][1]
    twin = states[old.row_of(best)][None]
    grown = tmp_path / "grown"
    write_cache(grown, {"text": torch.cat([states, twin])}, item_names=[*old.item_names[1:], "newcomer"])
    rows = recommend(capsys, run_folder / "run", "--history", "b03", "b04", "--k", "2", "--cache", str(grown))
    assert {row[1] for row in rows} == {best, "newcomer"}
    assert rows[0][2] == rows[1][2]


def test_a_run_without_an_items_file_prints_names(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    config = run / "config.yaml"
    # The last line is the digest of what was there.
    lines = [line for line in config.read_text().splitlines()[:-1] if not line.startswith("items:")]
    config.write_text("\n".join(lines))
    rows = recommend(capsys, run, "--history", "b03", "--k", "2")
    assert [len(row) for row in rows] == [3, 3]
