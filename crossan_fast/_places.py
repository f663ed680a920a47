"""Whether a name means a folder here or a repository of the Hugging Face hub, told without asking the hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def folder_or_repository(source: str | Path, name: str, *, owner: bool = False) -> Path | None:
    """The folder that `source` names; None where it can only be a repository of the hub.

    What cannot be one is a path, and one that is not there is said at once: what starts with `.`, `/` or
    `~`, ends in `/`, has more than one `/`, or lies in a folder that exists.

    Args:
        name: of the argument, for messages.
        owner: a repository is `owner/name`; else old ones without an owner count, too.

    Raises:
        FileNotFoundError: a path to nothing; the message has the folder beside it that is spelt nearly so.
        NotADirectoryError: a file.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name}: expected a folder, got the file {text}")
    certain = isinstance(source, Path) or path.is_absolute() or len(path.parts) > 2
    certain = certain or text.startswith((".", "~")) or text.endswith("/") or (owner and "/" not in text)
    inside = "/" in text and path.parent.is_dir()
    if not (certain or inside):
        return None
    near = _nearest(path)
    asked = "" if certain or near else f"; {path.parent} is a folder here, so that the hub was not asked"
    raise FileNotFoundError(f"{name}: no such folder: {text}{near}{asked}")


def _nearest(path: Path) -> str:
    """`; did you mean runs/a?`, where a folder stands beside a missing one, or beside a missing parent."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    beside = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
    for name in difflib.get_close_matches(missing.name, beside, n=1):
        found = missing.parent / name / path.relative_to(missing)
        return f"; did you mean {found}?" if found.is_dir() else ""
    return ""
