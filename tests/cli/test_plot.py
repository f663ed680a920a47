"""`crossan-fast plot`: what it writes, and the numbers behind the pictures."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import _findings, main
from crossan_fast.cli.plot import plot
from crossan_fast.training import TrainConfig, train


@pytest.fixture(scope="module")
def pair_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two modalities: one whose states tell items apart, and one that is noise an item lacks."""
    folder = tmp_path_factory.mktemp("pair")
    states = {"text": torch.randn(25, 2, 8), "noise": torch.zeros(25, 2, 8)}
    states["text"][0] = 0
    present = torch.ones(25, 2, dtype=torch.bool)
    present[0] = False
    present[5, 1] = False
    write_cache(folder / "cache", states, present=present, item_names=[f"b{i:02}" for i in range(24)])
    values = yaml.safe_load((run_folder / "config.yaml").read_text())
    values |= {"cache": str(folder / "cache"), "run": str(folder / "run"), "epochs": 6}
    train(TrainConfig.from_dict(values), progress=False)
    return folder / "run"


class Tags(HTMLParser):
    """Opened and closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_picture_and_a_report_that_needs_nothing_else(
    pair_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", str(pair_run)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ["curves.png", "gates.png", "cross.png", "experts.png", "without.png", "map.png", "report.html"]
    assert [path.name for path in written] == names
    assert all(path.parent == pair_run / "plots" for path in written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[:-1])
    page = written[-1].read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert [tag for tag, _ in tags.seen].count("picture") == 6
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert len(links) == 12 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in page
    assert main(["plot", str(pair_run), "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "map.png").read_bytes() == (pair_run / "plots" / "map.png").read_bytes()


def test_a_run_of_one_modality_shows_what_there_is(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plot(run_folder / "run", tmp_path)
    assert [path.stem for path in written] == ["curves", "gates", "map", "report"]


def test_what_a_modality_is_worth(pair_run: Path) -> None:
    """Zeros add nothing; without the states that tell items apart all scores tie, and ties lose."""
    found = _findings.find(pair_run)
    assert list(found.without) == ["", "text", "noise"]
    assert found.without["text"] == 0
    assert found.without[""] > 0.3
    assert found.explained["expert_weight"].shape == (24, 2)
    assert found.counts.sum() > 0 and found.layers == {"text": None, "noise": None}


def test_names_that_html_would_read_are_escaped(pair_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "<b>&run"
    shutil.copytree(pair_run, run, ignore=shutil.ignore_patterns("plots"))
    page = plot(run)[-1].read_text(encoding="utf-8")
    assert "<h1>&lt;b&gt;&amp;run</h1>" in page and "<b>" not in page


def test_principal_axes_are_those_of_the_spread() -> None:
    torch.manual_seed(3)
    plane = torch.randn(200, 2) * torch.tensor([5.0, 2.0])
    basis = torch.linalg.qr(torch.randn(7, 7)).Q[:2]
    points, (first, second) = _findings.principal_axes(plane @ basis + 3)
    assert first + second == pytest.approx(1) and first > second
    apart = [(x[:, None] - x).norm(dim=-1) for x in (plane, torch.from_numpy(points))]
    torch.testing.assert_close(apart[1], apart[0], atol=1e-4, rtol=1e-4)
    flat, shares = _findings.principal_axes(torch.ones(5, 3))
    assert (flat == 0).all() and shares == (0, 0)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "run: expected config.yaml" in capsys.readouterr().err
