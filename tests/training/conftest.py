"""A small world whose next item is nearly certain: item i follows item i - 1 on a ring."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossan_fast.cache.writer import write_cache
from crossan_fast.training import TrainConfig

ITEMS, USERS, LEVELS = 30, 48, 3


def make_world(folder: Path) -> None:
    """`cache/`, `users.tsv` and `items.tsv` in `folder`."""
    generator = torch.Generator().manual_seed(7)
    states = {name: torch.randn(ITEMS + 1, LEVELS, width, generator=generator) for name, width in WIDTHS}
    for state in states.values():
        state[0] = 0
    names = [f"item{i}" for i in range(1, ITEMS + 1)]
    write_cache(folder / "cache", states, item_names=names)
    lines = []
    for user in range(USERS):
        start, length = int(torch.randint(ITEMS, (), generator=generator)), 5 + user % 4
        lines.append(f"user{user}\t" + " ".join(names[(start + j) % ITEMS] for j in range(length)))
    (folder / "users.tsv").write_text("\n".join(lines) + "\n")
    (folder / "items.tsv").write_text("".join(f"{name}\tTitle of {name}\n" for name in names))


WIDTHS = (("text", 12), ("image", 20))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def values(world: Path, tmp_path: Path) -> dict[str, Any]:
    """Plain config values of a run that takes a second."""
    return {
        "cache": str(world / "cache"),
        "users": str(world / "users.tsv"),
        "items": str(world / "items.tsv"),
        "run": str(tmp_path / "run"),
        "model": {"embedding_dim": 16, "bottleneck": 8, "window": 5, "blocks": 1, "dropout": 0.2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.01},
        "batch_size": 10,
        "epochs": 3,
        "patience": None,
        "backend": "eager",
    }


@pytest.fixture
def config(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(values)


@pytest.fixture
def sizes() -> SimpleNamespace:
    return SimpleNamespace(items=ITEMS, users=USERS)
