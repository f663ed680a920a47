"""Settings from files that someone else may have written: YAML and JSON, read within bounds.

A settings file holds some hundred values. Whatever it holds, reading it takes a moment and little memory:
its size and depth are bounded, and YAML's aliases, by which a few lines stand for billions of values, are
refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# Sixties and eights of YAML 1.1.
_MISLEADING = re.compile(r"[^:]*:|[-+]?0_*[0-9]")


def read_settings(path: Path, name: str) -> str:
    """A settings file's text.

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: larger than a settings file can be, or no UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        return _bounded(content, name, str(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8: {error}") from error


def parse_yaml(text: str, name: str, source: str) -> Any:
    """The plain values of a YAML text.

    Args:
        name: of the argument, for messages.
        source: what the text is, for messages.

    Raises:
        ValueError: too large, too deep, with an alias or a key twice in one mapping, with a number that YAML
            1.1 reads otherwise than it looks (010 is 8, 1:30 is 90), or no YAML.
    """
    _bounded(text.encode("utf-8", "surrogatepass"), name, source)
    try:
        return yaml.load(text, _Loader)
    # A date of month 13, an integer too long to convert, or `!!bool maybe` is a bare error of any such type.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{name}: {source} is no YAML: {' '.join(str(error).split())}") from error


def parse_json(text: str, name: str) -> Any:
    """The plain values of a JSON text; errors as `parse_yaml`'s."""
    _bounded(text.encode("utf-8", "surrogatepass"), name, "the JSON text")
    return _json_values(text, name)


def read_json(path: Path, name: str, most: int) -> Any:
    """The plain values of a JSON file of at most `most` bytes.

    Raises:
        ValueError: larger, no UTF-8, no JSON, a key twice in one object, or nested too deep; `name` and
            `path` are in the message.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name}: {path}: expected at most {most} bytes, got more")
    return _json_values(content, f"{name}: {path}")


def _json_values(content: str | bytes, where: str) -> Any:
    try:
        return json.loads(content, object_pairs_hook=once_each)
    except RecursionError:
        raise ValueError(f"{where}: expected JSON of a few levels, got it nested too deep to read") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, got {error}") from error


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its keys and values, for `json.loads`, which would keep the last of two in silence.

    Raises:
        ValueError: a key that is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        again, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {again!r:.80} twice in one object")
    return values


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a JSON value is an integer (no bool, no 3.0) from `low` to `high`."""
    return type(value) is int and low <= value <= high


def _bounded(content: bytes, name: str, source: str) -> bytes:
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_BYTES} bytes in {source}, got more")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses aliases, deep nesting and a key given twice while it composes, before anything is built."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._refuse("aliases (*name) are not read here")
        if self._depth == MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            # YAML has it an error; the library would keep the last and drop the first in silence.
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and _MISLEADING.match(node.value):
            problem = (
                "expected a number without a colon and without a leading zero (YAML reads 1:30 as 90 and "
                f"010 as 8), got {node.value:.80}; in quotes it is text"
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def _refuse(self, problem: str) -> NoReturn:
        mark = self.peek_event().start_mark
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
