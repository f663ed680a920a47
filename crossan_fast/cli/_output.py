"""What commands print: text for people, or with `--json` one object for programs; notes go to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from crossan_fast._tables import is_numeric, text_table


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(args: argparse.Namespace, values: Mapping[str, object], text: object) -> None:
    """Print `values` as JSON where it was asked for, else `text`."""
    print(json.dumps(values, indent=2, ensure_ascii=False) if args.json else text)


def table(rows: Sequence[Mapping[str, str]], plain: str | None = None, *, title: str = "") -> str:
    """Rows with the same headings, drawn with `rich` where stdout is a terminal and the package is there.

    Elsewhere, as in a log, `plain`, by default a table without lines or colours.
    """
    if plain is None:
        plain = text_table(rows)
    if not sys.stdout.isatty() or not rows:
        return plain
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return plain
    drawn = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    drawn.show_header = any(head.strip() for head in rows[0])
    for head in rows[0]:
        right = is_numeric([row[head] for row in rows])
        drawn.add_column(Text(head), justify="right" if right else "left", overflow="fold")
    for row in rows:
        # What a name holds in brackets is no markup.
        drawn.add_row(*(Text(cell) for cell in row.values()))
    console = Console()
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip("\n")
