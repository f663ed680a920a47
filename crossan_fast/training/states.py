"""What made the states that a run was trained on, as far as it tells them from those of another making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossan_fast.cache import HiddenStateCache

Specs = Mapping[str, Mapping[str, Any]]

# What of a source's record makes other states of the same input; not where it lies, nor how it is stored.
_SPEC = ("kind", "model_type", "encoder_layers", "layers", "pool", "max_length", "lowercase")
# Of weights as they were loaded: two can be compared where they were computed with in one dtype.
_WEIGHTS, _DTYPE = "fingerprint", "compute_dtype"


def specs_of(cache: HiddenStateCache) -> dict[str, dict[str, Any]]:
    """By the names of modalities that an encoder made, as the cache says: what tells it from others.

    States that were computed elsewhere have a path alone, which says nothing of what they are.
    """
    return {
        name: {key: source[key] for key in (*_SPEC, _WEIGHTS, _DTYPE) if source.get(key) not in (None, "")}
        for name, source in cache.sources.items()
        if "encoder" in source
    }


def refuse_other_specs(held: Specs, cache: HiddenStateCache, names: Sequence[str]) -> None:
    """Raise ValueError where a modality of `names` was made in another way than `held` says.

    What either does not say, as an earlier version may not, is not compared.
    """
    there = specs_of(cache)
    for name in names:
        own, found = held.get(name, {}), there.get(name, {})
        keys = (*_SPEC, _WEIGHTS) if own.get(_DTYPE) == found.get(_DTYPE) else _SPEC
        for key in keys:
            if key in own and key in found and own[key] != found[key]:
                raise ValueError(
                    f"cache: modality {name!r}: expected states of {_said(key, own[key])} as in the run's "
                    f"cache, got {_said(key, found[key])}"
                )


def check_specs(specs: Any) -> None:
    """Raise TypeError where a file holds something else in place of `specs_of`."""
    if not isinstance(specs, Mapping) or not all(isinstance(spec, Mapping) for spec in specs.values()):
        raise TypeError(f"sources: expected what made each modality by name, got {specs!r}")


def _said(key: str, value: Any) -> str:
    if key == _WEIGHTS:
        return f"an encoder with weights {str(value)[:12]}"
    return f"{key} {value!r}"
