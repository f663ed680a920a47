"""What made the states that a run was trained on, as far as it tells them from those of another making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossan_fast.cache import HiddenStateCache
from crossan_fast.training.samples import check_sample, refuse_other_rows, sample_of

Specs = Mapping[str, Mapping[str, Any]]

# What of a source's record makes other states of the same input; not where it lies, nor how it is stored.
_SPEC = ("kind", "model_type", "encoder_layers", "layers", "pool", "max_length", "lowercase")
# Of weights as they were loaded: two can be compared where they were computed with in one dtype.
_WEIGHTS, _DTYPE = "fingerprint", "compute_dtype"
# Of states that were computed elsewhere; population.json has room for those of so many modalities.
_SAMPLE, _SAMPLED = "sample", 24


def specs_of(cache: HiddenStateCache) -> dict[str, dict[str, Any]]:
    """By the names of modalities: what tells the encoder that made one, as the cache says, from others.

    States that were computed elsewhere have a path alone, which says nothing of what they are: of these it is
    what some rows are like.
    """
    made = _made(cache)
    imported = [m.name for m in cache.modalities if m.name not in made]
    samples = {name: sample_of(cache, name) for name in imported[:_SAMPLED]}
    return made | {name: {_SAMPLE: sample} for name, sample in samples.items() if sample is not None}


def _made(cache: HiddenStateCache) -> dict[str, dict[str, Any]]:
    return {
        name: {key: source[key] for key in (*_SPEC, _WEIGHTS, _DTYPE) if source.get(key) not in (None, "")}
        for name, source in cache.sources.items()
        if "encoder" in source
    }


def refuse_other_specs(held: Specs, cache: HiddenStateCache, names: Sequence[str]) -> None:
    """Raise ValueError where a modality of `names` was made in another way than `held` says.

    What either does not say, as an earlier version may not, is not compared.
    """
    there = _made(cache)
    for name in names:
        own, found = held.get(name, {}), there.get(name, {})
        keys = (*_SPEC, _WEIGHTS) if own.get(_DTYPE) == found.get(_DTYPE) else _SPEC
        for key in keys:
            if key in own and key in found and own[key] != found[key]:
                raise ValueError(
                    f"cache: modality {name!r}: expected states of {_said(key, own[key])} as in the run's "
                    f"cache, got {_said(key, found[key])}"
                )


def refuse_other_samples(held: Specs, cache: HiddenStateCache, names: Sequence[str]) -> None:
    """Raise ValueError where imported states of a modality of `names` are others than `held` samples.

    Args:
        cache: its rows mean the items of those that were sampled.
    """
    for name in names:
        if sample := held.get(name, {}).get(_SAMPLE):
            refuse_other_rows(sample, cache, name)


def check_specs(specs: Any) -> None:
    """Raise TypeError where a file holds something else in place of `specs_of`."""
    if not isinstance(specs, Mapping) or not all(isinstance(spec, Mapping) for spec in specs.values()):
        raise TypeError(f"sources: expected what made each modality by name, got {specs!r}")
    for spec in specs.values():
        if _SAMPLE in spec:
            check_sample(spec[_SAMPLE])


def _said(key: str, value: Any) -> str:
    if key == _WEIGHTS:
        return f"an encoder with weights {str(value)[:12]}"
    return f"{key} {value!r}"
