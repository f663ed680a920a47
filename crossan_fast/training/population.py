"""What a run was trained and evaluated on, kept in its folder, so that its numbers can be had again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from crossan_fast._checks import check_integer
from crossan_fast._digests import sealed, unsealed
from crossan_fast._files import write_whole
from crossan_fast._untrusted import MAX_BYTES, read_json
from crossan_fast.cache import HiddenStateCache
from crossan_fast.data import Catalogue
from crossan_fast.training.states import check_specs, refuse_other_samples, refuse_other_specs, specs_of
from crossan_fast.training.task import Task

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OF_ORIGIN = ("origin", "note")
_WHOSE = ("run", *_OF_ORIGIN)
# Digests that came later: '' in runs of before, which nothing differs from.
_PARTS = {"training": "sequences to train on", "validation": "sequences to validate on"}

Part = Literal["training", "validation"]


@dataclass(frozen=True)
class Population:
    """Attributes:
    items, names: the catalogue: its size and digest. The cache's first rows are these, later ones are not.
    users: how many have sequences.
    used: how many items these name, the candidates unless the config ranks all.
    sequences: digest of the sequences that end in a test target, as rows, targets included.
    bases: by name, digests of the bases and centrings that modalities of the cache are stored in.
    run: names the run, the same for runs of one config and population; its files carry it. '' in runs of
        before they did.
    origin: names the run whose weights it started from; '' where that is none, or has no name.
    note: what its results have to say of that run; '' where there is nothing.
    training: digest of what is trained on, as rows, and of how often each counts; '' in runs of before it was
        kept. It holds users without a test target, too.
    validation: as `sequences`, of those that end in a validation target; '' in runs of before it was kept.
    sources: by name, what of its making tells a modality from others of the same items and widths; of those
        that the cache does not say it of, what some rows are like. In runs of before it was kept, nothing.
    """

    items: int
    names: str
    users: int
    used: int
    sequences: str
    bases: Mapping[str, str] = field(default_factory=dict, compare=False)
    run: str = field(default="", compare=False)
    origin: str = field(default="", compare=False)
    note: str = field(default="", compare=False)
    training: str = field(default="", compare=False)
    validation: str = field(default="", compare=False)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, task: Task) -> Population:
        split = task.split
        catalogue = split.catalogue
        return cls(
            catalogue.num_items,
            catalogue.digest,
            split.num_users,
            task.used.numel(),
            _digest_of(split.history_test, split.test_target),
            _digests(task.cache),
            training=_digest_of(split.train, split.train_counts),
            validation=_digest_of(split.history_validation, split.validation_target),
            sources=specs_of(task.cache),
        )

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue.known_by(self.items, self.names)

    def difference(self, now: Population, *parts: Part) -> str:
        """How what is there now differs from the run's, in words; empty where nothing does.

        Args:
            parts: to be compared, too, where the run says what they were; without any: items, sizes, and the
                sequences that end in a test target.
        """
        others = [_PARTS[part] for part in parts if getattr(self, part) not in ("", getattr(now, part))]
        if self == now and not others:
            return ""
        if (sizes := self._sizes()) != now._sizes():
            return f"{sizes} before, {now._sizes()} now"
        if self != now:
            others = ["names" if self.names != now.names else "sequences"]
        return f"{sizes} as before, but other {' and '.join(others)}"

    def data(self) -> dict[str, Any]:
        """Plain values of what it is, without whose and where that came from, and what its states are."""
        return {name: value for name, value in asdict(self).items() if name not in (*_WHOSE, "sources")}

    def require_states(self, cache: HiddenStateCache, names: Sequence[str]) -> None:
        """Raise where a cache has modalities `names` in another frame than the run's model was trained on, or
        of another encoder, pooling or levels, or imported ones that are others.

        Numbers of the same shape, which mean other states.
        """
        there = _digests(cache)
        for name in names:
            own, found = self.bases.get(name), there.get(name)
            if own != found:
                raise ValueError(
                    f"cache: modality {name!r}: expected {_said(own)} as in the run's cache, "
                    f"got {_said(found)}"
                )
        refuse_other_specs(self.sources, cache, names)
        if cache.catalogue.starts_with(self.catalogue):  # rows of other items say nothing
            refuse_other_samples(self.sources, cache, names)

    def appended(self, cache: Catalogue) -> str:
        """How a cache's items differ from the run's, in words; empty where nothing does."""
        if cache == self.catalogue:
            return ""
        if not cache.starts_with(self.catalogue):
            return "the cache is of other items than the run's"
        new = cache.num_items - self.items
        return f"{new:,} of the cache's {cache.num_items:,} items came after training"

    def _sizes(self) -> str:
        return f"{self.users:,} users of {self.used:,} of {self.items:,} items"

    def write(self, path: Path) -> None:
        # Of no origin it is as a version of before origins were kept reads it.
        optional = (*_OF_ORIGIN, *_PARTS, "sources")
        kept = {name: value for name, value in asdict(self).items() if value or name not in optional}
        write_whole(path, json.dumps(sealed(kept), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Population | None:
        """None where there is no such file: a run of before it was kept."""
        if not path.is_file():
            return None
        try:
            held = cls(**unsealed(read_json(path, "run", MAX_BYTES), "run", path))
            held._check()
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"run: {path} cannot be read: {error}") from error
        return held

    def _check(self) -> None:
        """Raise unless the fields are what `write` writes: a file may be damaged, or another's."""
        for name in ("items", "users", "used"):
            check_integer(name, getattr(self, name), 0)
        if not isinstance(self.bases, Mapping):
            raise TypeError(f"bases: expected digests by name, got {self.bases!r}")
        check_specs(self.sources)
        held = [(name, value) for name in _PARTS if (value := getattr(self, name)) != ""]
        held += [("names", self.names), ("sequences", self.sequences)]
        for name, value in (*held, *self.bases.items()):
            if not isinstance(value, str) or not _DIGEST.fullmatch(value):
                raise ValueError(f"{name}: expected 64 hexadecimal digits, got {value!r}")
        for name in _WHOSE:
            if not isinstance(text := getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {text!r}")


def _digest_of(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(list(tensor.shape)).encode())
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _digests(cache: HiddenStateCache) -> dict[str, str]:
    return {name: frame.digest() for name, frame in cache.frames.items()}


def _said(frame: str | None) -> str:
    if frame is None:
        return "states as their encoder gave them"
    return f"states in basis or centring {frame[:12]}"
