"""Tables: drawn on a terminal, plain text without escapes anywhere else, the same cells in both."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crossan_fast._tables import text_table
from crossan_fast.cli import main
from crossan_fast.cli._output import table

ROWS = [{"name": "a [red]b[/red]", "k": "5"}, {"name": "", "k": "1,000.25"}]


def test_plain_tables() -> None:
    assert text_table(ROWS).splitlines() == [
        "name                   k",
        "a [red]b[/red]         5",
        "                1,000.25",
    ]
    assert text_table([]) == ""


def test_a_terminal_gets_lines_and_a_log_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    assert table(ROWS) == text_table(ROWS) and table(ROWS, "as before") == "as before"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    drawn = table(ROWS, "as before", title="Title")
    assert "\x1b[" in drawn and "Title" in drawn and "─" in drawn
    assert all(cell in drawn for row in ROWS for cell in row.values()), "brackets in a name are no markup"
    monkeypatch.setitem(sys.modules, "rich.box", None)
    assert table(ROWS) == text_table(ROWS), "without the package"


@pytest.mark.parametrize("command", ["evaluate", "doctor", "info"])
def test_commands_draw_on_a_terminal_what_they_print_in_a_log(
    run_folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    line = {
        "evaluate": ["evaluate", "--run", str(run_folder / "run"), "--lists"],
        "doctor": ["doctor"],
        "info": ["cache", "info", str(run_folder / "cache")],
    }[command]
    capsys.readouterr()
    assert main(line) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "900")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(line) == 0
    drawn = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert (drawn != plain and "─" in drawn) or command == "doctor"
    # Before its protocol `evaluate` says how much memory is free.
    wanted = plain[plain.find("test targets of") :] if command == "evaluate" else plain
    if command != "info":
        assert set(wanted.split()) <= set(drawn.split())


def test_a_real_terminal() -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    script = "from crossan_fast.cli._output import table; print(table([{'k': '5'}]))"
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, env=environment) as process:
        assert process.wait(timeout=120) == 0
        os.close(theirs)
        said = os.read(ours, 10_000).decode()
        os.close(ours)
    assert "\x1b[" in said and "─" in said
