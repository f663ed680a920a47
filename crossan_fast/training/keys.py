"""Which key of a run's config was meant by an unknown one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from crossan_fast._checks import nearest
from crossan_fast.data.columns import ITEMS_ROLES, USERS_ROLES

# A column's key as command lines and other libraries have it: `user_column`, `USER_ID_FIELD`, `rating_col`.
_COLUMN = re.compile(r"(?:column_)?([a-z]+?)(?:_?id)?_?(?:stamp)?_?(?:col|column|field|key)s?(?:_name)?")

# How near a key of another section has to be: an exact name, or a slip of the hand in a long one.
_SLIP = 0.8
# How near the last resort has to be: at 0.6, `time` is still near `optimizer`.
_NEAR = 0.65
# Columns' roles that stand at the top of a config in place of `columns: {time: NAME}`.
_BARE = ("time", "rating", "label", "title")


def nearest_of_all(key: str, section: str, sections: Mapping[str, list[str]]) -> str:
    """`; did you mean 'optimizer.learning_rate'?` for a dotted key, from its own section or another.

    Args:
        key: without its section.
        section: `optimizer`, or '' for the top.
        sections: every section's keys.
    """
    if section == "" and key not in ("columns", "item_columns") and (column := _column(key)):
        return f"; did you mean {column!r}?"

    def dotted(where: str, cutoff: float) -> str:
        hint = nearest(key, sections[where], cutoff)
        return hint.replace("mean '", f"mean '{where}.") if where else hint

    order = sorted(sections, key=lambda where: where != section)
    # First habits from elsewhere and exact names; of other sections slips alone, the rest would be guessing.
    for where in order:
        if nearest(key, sections[where], cutoff=1.0):
            return dotted(where, 1.0)
    slips = (dotted(where, _SLIP) for where in order)
    if hint := next(filter(None, slips), ""):
        return hint
    if section == "" and key.lower() in _BARE:
        return f"; did you mean {_of_role(key.lower())!r}?"
    # A column's key of no known role (`image_column`) is near `item_columns` by its ending alone.
    return "" if section == "" and _COLUMN.fullmatch(key.lower()) else dotted(section, _NEAR)


def _column(key: str) -> str | None:
    """The setting of a column that a key at the top of a config means; None: it means none."""
    found = _COLUMN.fullmatch(key.lower())
    return None if found is None else _of_role(found[1])


def _of_role(role: str) -> str | None:
    if role in USERS_ROLES:
        return f"columns.{role}"
    return f"item_columns.{role}" if role in ITEMS_ROLES else None
