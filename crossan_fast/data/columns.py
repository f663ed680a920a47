"""What columns of people's tables are called, and which of them mean what.

A role (`user`, `item`, `time`, …) is taken by the first of its names that the table's header has, or by the
column that the caller names. Names are compared in lower case, with `_` for spaces and hyphens, and without
RecBole's types (`user_id:token`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from crossan_fast._checks import nearest

# In order of preference: Amazon's metadata are by `parent_asin`; `id` may be a row's own number; a `date`
# says least of when.
NAMES: Mapping[str, tuple[str, ...]] = {
    "user": (
        *("user", "user_id", "userid", "uid", "reviewer_id", "reviewerid", "customer", "customer_id"),
        *("visitor_id", "visitorid", "session_id", "sessionid"),
    ),
    "item": (
        *("item", "item_id", "itemid", "parent_asin", "asin", "iid", "movie_id", "movieid", "video_id"),
        *("product_id", "productid", "article_id", "sku", "id"),
    ),
    "items": ("items", "item_ids", "item_id_list", "item_list", "history", "sequence"),
    "time": (
        "timestamp",
        "time",
        "unixreviewtime",
        "unix_time",
        "datetime",
        "event_time",
        "created_at",
        "ts",
        "date",
    ),
    "rating": ("rating", "overall", "stars", "score"),
    "label": ("x_label", "split"),
    "title": ("title", "item_title", "movie_title", "product_title", "product_name", "name"),
}

USERS_ROLES = ("user", "item", "items", "time", "rating", "label")
ITEMS_ROLES = ("item", "title")

_TYPED = re.compile(r"(.+):(token|token_seq|float|float_seq)")


def normal(cell: str) -> str:
    """A header cell as it is compared: `Image path` is `image_path`."""
    return "_".join(cell.lower().replace("-", " ").split())


def alike(cells: Sequence[str], names: Sequence[str]) -> str:
    """What to say where two columns of a header, `cells`, have one of the `names`; empty where none have.

    Either could be the one that a role means. Columns without a name are none's.
    """
    found: dict[str, str] = {}
    for cell, name in zip(cells, names, strict=True):
        if name in found:
            two = f"{found[name]!r} and {cell!r}"
            return f"expected different column names, got {two}, which are both read as {name!r}"
        if name:
            found[name] = cell
    return ""


def untyped(cells: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Names and types of RecBole's header (`user_id:token`), None where a cell has no such type."""
    matches = [_TYPED.fullmatch(cell.strip()) for cell in cells]
    found = [match for match in matches if match is not None]
    if len(found) < len(cells):
        return None
    return [match[1] for match in found], [match[2] for match in found]


class Columns:
    """Which column takes which role: the caller's wishes, for one table.

    Args:
        wishes: column names by role; a number stands for the column at that place, from 1, of a table
            without a header.
        roles: those that may be wished for.
        argument: what the wishes are called in a message.

    Raises:
        ValueError: an unknown role, with the nearest known one.
    """

    def __init__(
        self, wishes: Mapping[str, str | int] | None, roles: Collection[str], argument: str = "columns"
    ) -> None:
        self._wishes = {role: str(name) for role, name in (wishes or {}).items() if name not in (None, "")}
        for role in self._wishes:
            if role not in roles:
                raise ValueError(
                    f"{argument}: expected some of {', '.join(roles)}, got {role!r}{nearest(role, roles)}"
                )

    @property
    def by_place(self) -> bool:
        """Whether every wish is a number."""
        return bool(self._wishes) and all(name.isdecimal() for name in self._wishes.values())

    def wished(self, role: str) -> bool:
        """Whether the caller says which column takes `role`."""
        return role in self._wishes

    def lacking(self, first: Sequence[str]) -> str:
        """What to say of a table without a header where columns are wished for by name; empty where none is.

        Args:
            first: the cells of its first line, which would be the header.
        """
        names = [name for name in self._wishes.values() if not name.isdecimal()]
        if not names:
            return ""
        hint = next(filter(None, (nearest(normal(name), first) for name in names)), "")
        line = ", ".join(first)
        cut = line if len(line) <= 100 else line[:97] + "..."
        wished = ", ".join(map(repr, names))
        return f"expected a first line that names the columns, {wished} among them, got {cut}{hint}"

    def keys(self, role: str) -> set[str]:
        """The names that make a first line a header where `role` has to be there: its own, and all wishes."""
        if self.by_place:
            return set()
        wished = {normal(name) for name in self._wishes.values() if not name.isdecimal()}
        return wished if role in self._wishes else wished | set(NAMES[role])

    def find(self, header: Sequence[str], role: str, where: str) -> int | None:
        """The place of the column that takes `role`, None where there is none.

        Raises:
            ValueError: the caller named one that `header` lacks; with the nearest that it has.
        """
        wish = self._wishes.get(role)
        if wish is None:
            return next((header.index(name) for name in NAMES[role] if name in header), None)
        if normal(wish) not in header:
            raise ValueError(
                f"{where}: expected a column {wish!r} for {role}s, got {', '.join(header)}"
                f"{nearest(normal(wish), header)}"
            )
        return header.index(normal(wish))

    def place(self, role: str, width: int, where: str, first: Sequence[str]) -> int | None:
        """As `find`, in a table without a header.

        Raises:
            ValueError: no such column, or its cell in the `first` line is what such columns are called.
        """
        wish = self._wishes.get(role)
        if wish is None:
            return None
        if not 1 <= int(wish) <= width:
            raise ValueError(f"{where}: expected a column from 1 to {width} for {role}s, got {wish}")
        if (name := first[int(wish) - 1]) in NAMES[role]:
            raise ValueError(
                f"{where}: expected no header where columns are numbers, got a first line with {name!r} in "
                f"column {wish}, for {role}s; give columns' names in place of numbers"
            )
        return int(wish) - 1
