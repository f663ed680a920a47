"""Readers of users' files, splits, and the synthetic shop."""

from crossan_fast.data.interactions import Dropped, Interactions, build_interactions, read_interactions
from crossan_fast.data.items import ItemTable, read_items
from crossan_fast.data.splits import Split, leave_one_out

__all__ = [
    "Dropped",
    "Interactions",
    "ItemTable",
    "Split",
    "build_interactions",
    "leave_one_out",
    "read_interactions",
    "read_items",
]
