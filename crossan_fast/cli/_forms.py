"""What files look like, in three lines each for `--help`, and the options that name their columns."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

USERS = """\
users: `user<TAB>item item item` without a header; or an interaction a row, its header naming user, item, time
  and rating (CSV, TSV, .inter of RecBole or MMRec, JSON lines, Parquet; gzipped or not); or a user and a list
  a row; times are Unix (s, ms) or ISO 8601; columns of other names: --user-column and so on
"""
ITEMS = """\
items: `item<TAB>title` without a header; or an item a row, its header naming the item, its title, and paths
  from the file's folder (image_path, video_path, audio_path): CSV, TSV, .item of RecBole, JSON lines such
  as Amazon's, Parquet; gzipped or not; columns of other names: --item-column, --title-column
"""

USERS_COLUMNS = ("user", "item", "items", "time", "rating", "label")
ITEMS_COLUMNS = ("item", "title")
_MEANING = {
    "user": "users' names",
    "item": "items' names",
    "items": "users' sequences of items",
    "time": "times",
    "rating": "ratings",
    "label": "a split that comes with the file (0, 1, 2 or train, validation, test)",
    "title": "titles",
}


def add_column_options(parser: argparse.ArgumentParser, roles: Collection[str]) -> None:
    """Options `--user-column NAME` and so on, for a file whose header has other names than the usual ones."""
    for role in roles:
        parser.add_argument(
            f"--{role}-column",
            metavar="NAME",
            help=f"column of {_MEANING[role]}; a number where there is no header",
        )


def columns_of(args: argparse.Namespace, roles: Collection[str]) -> dict[str, Any]:
    """What `add_column_options` was given, as readers take it."""
    given = {role: getattr(args, f"{role}_column") for role in roles}
    return {role: name for role, name in given.items() if name is not None}
