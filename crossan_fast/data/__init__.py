"""Readers of users' files, splits, and the synthetic shop."""

from crossan_fast.data.catalogue import Catalogue
from crossan_fast.data.interactions import (
    Dropped,
    Interactions,
    build_interactions,
    read_interactions,
    split_files,
)
from crossan_fast.data.items import ItemTable, read_items
from crossan_fast.data.shop import Shop, make_shop
from crossan_fast.data.splits import Split, as_given, by_ratio, by_time, hold_out_users, leave_one_out

__all__ = [
    "Catalogue",
    "Dropped",
    "Interactions",
    "ItemTable",
    "Shop",
    "Split",
    "as_given",
    "build_interactions",
    "by_ratio",
    "by_time",
    "hold_out_users",
    "leave_one_out",
    "make_shop",
    "read_interactions",
    "read_items",
    "split_files",
]
