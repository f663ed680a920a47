"""What commands print: text for people, or with `--json` one object for programs; notes go to stderr."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(args: argparse.Namespace, values: Mapping[str, object], text: object) -> None:
    """Print `values` as JSON where it was asked for, else `text`."""
    print(json.dumps(values, indent=2, ensure_ascii=False) if args.json else text)
