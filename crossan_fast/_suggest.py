"""Dataclasses that suggest a field for an unknown one."""

from __future__ import annotations

import functools
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
