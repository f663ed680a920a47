"""What a build has done so far, in building.json: so that a stopped one goes on where it was."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossan_fast._files import write_whole
from crossan_fast._untrusted import is_whole
from crossan_fast.cache.format import BUILDING, CacheError, read_journal


@dataclass
class Journal:
    """Progress of one build or append.

    Attributes:
        plan: what must be the same for finished rows to mean the same (settings, items), by what to call it.
        base: which state of which cache it began with, '' for none.
        done: for each pass over the items, bool `[items]`; what it has nothing to encode of is done at once.
        fingerprints: of each pass's encoder weights, '' before it was loaded.
        spared: how many of `done` were so from the beginning.
        broken: modality -> item's index -> reason, of inputs that could not be used.
    """

    plan: Mapping[str, str]
    base: str
    done: list[npt.NDArray[np.bool_]]
    fingerprints: list[str]
    spared: int = 0
    broken: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, plan: Mapping[str, str], base: str, todo: Sequence[npt.NDArray[np.bool_]]) -> Journal:
        done = [~needed for needed in todo]
        return cls(plan, base, done, [""] * len(done), int(sum(each.sum() for each in done)))

    @property
    def begun(self) -> bool:
        """Whether anything was encoded."""
        return sum(int(done.sum()) for done in self.done) > self.spared

    def write(self, folder: Path) -> None:
        """Put it beside the data, whole or not at all."""
        body = {
            "plan": dict(self.plan),
            "base": self.base,
            "encoded": int(sum(done.sum() for done in self.done)) - self.spared,
            "to_encode": sum(len(done) for done in self.done) - self.spared,
            "items": len(self.done[0]),
            "spared": self.spared,
            "done": [base64.b64encode(np.packbits(done).tobytes()).decode() for done in self.done],
            "fingerprints": self.fingerprints,
            "broken": self.broken,
        }
        write_whole(folder / BUILDING, json.dumps(body, ensure_ascii=False))

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of a stopped build in `folder`, or None."""
        path = folder / BUILDING
        if not path.is_file():
            return None
        try:
            body: dict[str, Any] = read_journal(folder)
            items = body["items"]
            done = [_unpacked(bits, items) for bits in body["done"]]
            spared, fingerprints = body["spared"], [str(each) for each in body["fingerprints"]]
            broken = {
                str(name): {_row(row, items): str(why) for row, why in rows.items()}
                for name, rows in body["broken"].items()
            }
            if len(fingerprints) != len(done) or not is_whole(spared, 0, items * len(done)):
                raise ValueError(f"{len(done)} passes, {len(fingerprints)} fingerprints, {spared!r} spared")
            return cls(dict(body["plan"]), str(body["base"]), done, fingerprints, spared, broken)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{path}: damaged, or of another version ({type(error).__name__}: {error}); "
                "begin anew with restart=True (--restart)"
            ) from error

    def check_plan(
        self, plan: Mapping[str, str], todo: Sequence[npt.NDArray[np.bool_]], folder: Path
    ) -> None:
        """Raise where the build that was stopped is not the one that is to go on."""
        for what, digest in plan.items():
            if self.plan.get(what) == digest:
                continue
            raise CacheError(
                f"folder: the build that was stopped in {folder} had other {what}; go on "
                "with the same, or begin anew with restart=True (--restart)"
            )
        if [len(done) for done in self.done] != [len(needed) for needed in todo]:
            raise CacheError(
                f"{folder / BUILDING}: expected {len(todo)} passes over {len(todo[0])} items, got "
                f"{[len(done) for done in self.done]}; begin anew with restart=True (--restart)"
            )


def _unpacked(bits: str, count: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(base64.b64decode(bits), np.uint8)
    if not is_whole(count, 8 * len(packed) - 7, 8 * len(packed)):
        raise ValueError(f"items: expected as many as {len(packed)} bytes have bits for, got {count!r}")
    return np.unpackbits(packed, count=count).astype(np.bool_)


def _row(text: str, items: int) -> int:
    if not is_whole(row := int(text), 0, items - 1):
        raise ValueError(f"broken: expected an item of {items}, got {text!r}")
    return row
