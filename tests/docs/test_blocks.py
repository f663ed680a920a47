"""Every block of README and of the site runs as it stands, a page from top to bottom, beside a tiny shop.

Before a block, `<!-- compiled only: REASON -->` says why it can't run here: Python is then compiled, and
commands are read by their own parsers.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doc_pages import PAGES, ROOT, blocks

from crossan_fast import cli
from crossan_fast.cache import build_cache
from crossan_fast.cli._tiny_encoders import save_tiny_encoders
from crossan_fast.data import make_shop, read_items
from crossan_fast.training import TrainConfig, train


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `crossan-fast demo` leaves, smaller, with a cache, users, items, a config and a run beside it."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CROSSAN_FAST_BACKEND", "eager")
        demo = Path("crossan-fast-demo")
        made = make_shop(demo / "shop", num_items=256, num_users=150)
        encoders = save_tiny_encoders(demo / "encoders", made.titles, 0)
        # The demo's shop has a thousand items and more, whose names have a digit more.
        for name in ("items.tsv", "users.tsv"):
            file = demo / "shop" / name
            file.write_text(re.sub(r"\bitem-(\d{3})(?=[\t \n])", r"item-0\1", file.read_text()))
        table = (demo / "shop" / "items.tsv").read_text().splitlines()
        Path("items.tsv").write_text("".join("\t".join(line.split("\t")[:2]) + "\n" for line in table))
        shutil.copy(demo / "shop" / "users.tsv", "users.tsv")
        specs = [f"text={encoders['text'].resolve()}:levels=3"]
        build_cache(read_items("items.tsv"), specs, "cache", dtype="fp32", progress=False)
        config = {
            "cache": "cache",
            "users": "users.tsv",
            "items": "items.tsv",
            "run": "runs/mine",
            "epochs": 2,
        }
        config |= {"model": {"embedding_dim": 32, "bottleneck": 8, "blocks": 1}}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        train(TrainConfig.from_dict(config), progress=False)
    return folder


@pytest.fixture
def here(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shop, and the folder that blocks run in."""
    folder = tmp_path / "page"
    big = shutil.ignore_patterns("crossan-fast-demo")
    shutil.copytree(shop, folder, ignore=big)
    (folder / "crossan-fast-demo").symlink_to(shop / "crossan-fast-demo")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "eager")
    return folder


def names_at_hand(page: Path) -> dict[str, Any]:
    """What README's reader has in a loop of their own."""
    if page.name != "README.md":
        return {}
    item_ids = torch.randint(1, 30, (4, 6))
    states = {name: torch.randn(30, 7, 768)[item_ids] for name in ("text", "image")}
    return {"train_counts": torch.ones(30, dtype=torch.int64), "item_ids": item_ids, "states": states}


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=lambda page: page.stem)
def test_blocks_run(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_at_hand(page)
    if page.stem == "tutorial":  # it makes these itself
        for name in ("cache", "runs"):
            shutil.rmtree(here / name)
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            # Lines are counted as in the page, so that a traceback points there.
            code = compile("\n" * block.line + block.text, where, "exec")
            if block.runs:
                exec(code, names)
        elif block.language == "bash":
            for command in commands(block.text):
                run_command(command, block.runs, where, capsys)
        elif block.language == "yaml":
            values = yaml.safe_load(block.text)
            TrainConfig.from_dict(values)
            if title := re.match(r"# (\S+\.yaml)\n", block.text):
                (here / title[1]).write_text(block.text)
        else:
            assert block.language in ("", "text"), f"{where}: a block of {block.language!r} is not looked at"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, without comments; `a && b` are two."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def run_command(words: list[str], runs: bool, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    while re.match(r"[A-Z_]+=", words[0]):
        assert re.search(rf'"{words[0].partition("=")[0]}"', SOURCES), f"{where}: nothing reads {words[0]}"
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    if program == "torchrun":
        program, words = "crossan-fast", words[words.index("crossan_fast") :]
    if program == "crossan-fast":
        parsed = parsed_command(words[1:], where)
        if runs and parsed.command != "demo":  # it takes a minute, and has tests of its own
            capsys.readouterr()
            assert cli.main(words[1:]) == 0, f"{where}: {capsys.readouterr().err}"
    elif program == "pip" or words[:2] == ["python3", "-m"]:
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= EXTRAS, f"{where}: pyproject.toml has no extra {extras}"
    elif program == "python":
        assert words[1] == "-m"
        if runs:
            assert importlib.import_module(f"{words[2]}.__main__").main(words[3:]) == 0
        else:
            importlib.import_module(words[2])
    elif program == "pytest":
        pass
    else:
        assert (ROOT / program).is_file(), f"{where}: no file {program}"


def parsed_command(arguments: list[str], where: str) -> Any:
    try:
        return cli._parser(arguments).parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{where}: crossan-fast does not take {arguments}")


SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in [ROOT / "setup.py", *(ROOT / "crossan_fast").rglob("*.py")]
)
_OPTIONAL = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", _OPTIONAL, re.M))


@pytest.mark.parametrize("package", ["", ".cache", ".data", ".training", ".ops"])
def test_every_package_shows_its_public_names(package: str) -> None:
    """A package's entry shows what its `__all__` holds."""
    shown = "".join((ROOT / "docs" / name).read_text() for name in ("api.md", "api-ops.md"))
    assert f"\n::: crossan_fast{package}\n" in shown
    module = importlib.import_module(f"crossan_fast{package}")
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    code = r"^```.*?^```|`[^`\n]+`|^    .*$"
    text = re.sub(code, "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_read_in_a_minute() -> None:
    prose = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```", "", PAGES[0].read_text(), flags=re.S)
    assert len(prose.split()) < 500
