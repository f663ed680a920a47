"""The help of every command that takes a file shows what the file looks like."""

from __future__ import annotations

import pytest

from crossan_fast.cli import main
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
