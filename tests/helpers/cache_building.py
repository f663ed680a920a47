"""What the tests of building a cache share: specs of the tiny encoders, parts of the items, a short build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from crossan_fast.cache import build_cache
from crossan_fast.cache.build.encoders import FrozenEncoder
from crossan_fast.data.items import ItemTable

LEVELS = 3


def specs_of(encoders: dict[str, Path]) -> list[str]:
    return [
        f"text={encoders['bert']}:levels=3",
        f"image={encoders['vit']}:levels=3:pool=cls",
        f"video={encoders['videomae']}:levels=3",
        f"audio={encoders['ast']}:levels=0,1,2",
    ]


def subset(items: ItemTable, indices: list[int], **changed: dict[int, str | None]) -> ItemTable:
    columns = {name: [column[i] for i in indices] for name, column in items.columns.items()}
    for name, cells in changed.items():
        for place, cell in cells.items():
            columns[name][place] = cell
    return ItemTable([items.names[i] for i in indices], columns, items.folder)


def build(items: ItemTable, modalities: Any, out: Path, **options: Any) -> Any:
    return build_cache(
        items, modalities, out, **{"batch_size": 4, "dtype": "fp32", "progress": False, **options}
    )


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the items of each call of an encoder from here on."""
    encoded: list[int] = []
    states = FrozenEncoder.states

    def counted(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        encoded.append(len(inputs))
        return states(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "states", counted)
    return encoded


def files_of(folder: Path) -> dict[str, bytes]:
    """What the files hold, but for the files' times in digests.bin and its checksum."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if "digests.bin" in files:
        records = np.frombuffer(files["digests.bin"], np.uint8).reshape(-1, 32)
        files["digests.bin"] = records[:, :16].tobytes()
        meta = json.loads(files["meta.json"])
        del meta["files"]["digests.bin"], meta["sha256"]
        files["meta.json"] = json.dumps(meta).encode()
    return files
