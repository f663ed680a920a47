"""What a build has done so far, in building.json: so that a stopped one goes on where it was."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossan_fast.cache.format import BUILDING, CacheError, write_atomically


@dataclass
class Journal:
    """Progress of one build or append.

    Attributes:
        plan: what must be the same for finished rows to mean the same (settings, items), by what to call it.
        base_items: items of the cache when the build began.
        done: for each pass over the items, bool `[new items]`.
        fingerprints: of each pass's encoder weights, '' before it was loaded.
        broken: modality -> new item's index -> reason, of inputs that could not be used.
    """

    plan: Mapping[str, str]
    base_items: int
    done: list[npt.NDArray[np.bool_]]
    fingerprints: list[str]
    broken: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, plan: Mapping[str, str], base_items: int, passes: int, new_items: int) -> Journal:
        return cls(plan, base_items, [np.zeros(new_items, np.bool_) for _ in range(passes)], [""] * passes)

    def write(self, folder: Path) -> None:
        """Put it beside the data, whole or not at all."""
        body = {
            "plan": dict(self.plan),
            "base_items": self.base_items,
            "encoded": int(sum(done.sum() for done in self.done)),
            "to_encode": sum(len(done) for done in self.done),
            "new_items": len(self.done[0]),
            "done": [base64.b64encode(np.packbits(done).tobytes()).decode() for done in self.done],
            "fingerprints": self.fingerprints,
            "broken": self.broken,
        }
        write_atomically(folder / BUILDING, json.dumps(body, ensure_ascii=False))

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of a stopped build in `folder`, or None."""
        path = folder / BUILDING
        if not path.is_file():
            return None
        try:
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                body["plan"],
                body["base_items"],
                [_unpacked(bits, body["new_items"]) for bits in body["done"]],
                body["fingerprints"],
                {name: {int(i): why for i, why in rows.items()} for name, rows in body["broken"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{path}: damaged ({type(error).__name__}: {error}); begin anew with restart=True (--restart)"
            ) from error

    def check_plan(self, plan: Mapping[str, str], folder: Path) -> None:
        """Raise where the build that was stopped is not the one that is to go on."""
        for what, digest in plan.items():
            if self.plan.get(what) == digest:
                continue
            raise CacheError(
                f"folder: the build that was stopped in {folder} had other {what}; go on "
                "with the same, or begin anew with restart=True (--restart)"
            )


def _unpacked(bits: str, count: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(base64.b64decode(bits), np.uint8)
    return np.unpackbits(packed, count=count).astype(np.bool_)
