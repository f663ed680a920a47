"""`key=value` laid over what a config's file says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossan_fast._untrusted import parse_yaml
from crossan_fast.config import CrossanConfig


def laid_over(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`apply_overrides`; to another architecture what the file has by default of its own gives way.

    A run's config.yaml has every field: IISAN's towers with CROSSAN's activation and head would be neither.
    """
    result = apply_overrides(values, overrides)
    before, after = values.get("model"), result.get("model")
    named = {override.partition("=")[0] for override in overrides}
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or "model" in named:
        return result
    old, new = CrossanConfig.defaults(before), CrossanConfig.defaults(after)
    result["model"] = {
        key: value
        for key, value in after.items()
        if old.get(key) == new.get(key) or value != old.get(key) or f"model.{key}" in named
    }
    return result


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `a.b=value` set; values are read as YAML."""
    result = dict(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override: expected key=value, got {override!r}")
        value = parse_yaml(text, "override", f"the value of {override!r}")
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            if inner is not None and not isinstance(inner, Mapping):
                raise ValueError(f"override: {parent!r} in {override!r} has no fields")
            place[parent] = dict(inner or {})
            place = place[parent]
        place[last] = value
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
