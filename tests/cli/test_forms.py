"""The help of every command that takes a file shows what the file looks like."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from crossan_fast.cli import COMMANDS, _parser, main
from crossan_fast.cli._forms import ITEMS, USERS


@pytest.mark.parametrize(
    ("command", "forms", "options"),
    [
        (["cache", "build"], [ITEMS], ["--item-column", "--title-column"]),
        (["cache", "import"], [ITEMS], ["--ids", "--item-column"]),
        (["train"], [USERS, ITEMS], ["--user-column", "--label-column"]),
        (["evaluate"], [USERS], ["--users", "--time-column"]),
        (["recommend"], [USERS, ITEMS], ["--histories", "--items-column"]),
    ],
)
def test_help_shows_forms(
    command: list[str], forms: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for form in forms:
        assert form in shown and form.count("\n") == 3
    for option in options:
        assert option in shown


def options_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every option of a command and of the commands below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)
        elif action.option_strings:
            yield f"{parser.prog} {action.option_strings[0]}", action


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_for_several_values_may_be_given_several_times(command: str) -> None:
    """`--basis text=64 --basis image=32` is as good as one `--basis`: argparse alone would keep the last."""
    lists = {name: action for name, action in options_of(_parser([command])) if action.nargs in ("+", "*")}
    for name, action in lists.items():
        assert isinstance(action, argparse._ExtendAction), name
        assert not action.default, f"{name}: what is given would be added to the default"
    if command == "cache":
        assert {"crossan-fast cache convert --basis", "crossan-fast cache build --re-encode"} <= set(lists)
