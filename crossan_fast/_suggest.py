"""What other libraries call our fields, and dataclasses that suggest a field for an unknown one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from crossan_fast._checks import nearest

_Class = TypeVar("_Class")


def suggesting(cls: type[_Class]) -> type[_Class]:
    """Let a dataclass raise TypeError with the nearest known field for an unknown one."""
    init = cls.__init__
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{cls.__name__}: unknown field {name!r}{nearest(name, known)}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def nearest_of_all(key: str, section: str, sections: Mapping[str, list[str]]) -> str:
    """`; did you mean 'optimizer.learning_rate'?` for a dotted key, from its own section or another.

    Args:
        key: without its section.
        section: `optimizer`, or '' for the top.
        sections: every section's keys.
    """

    def dotted(where: str) -> str:
        hint = nearest(key, sections[where])
        return hint.replace("mean '", f"mean '{where}.") if where else hint

    # Of other sections exact names alone, and what is habit elsewhere: the rest would be guessing.
    exact = [where for where, names in sections.items() if nearest(key, names, cutoff=1.0)]
    return dotted(exact[0] if exact and section not in exact else section)
