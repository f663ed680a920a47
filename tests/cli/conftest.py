"""One trained run for the commands that read a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main

ITEMS, USERS = 24, 30


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache/, users.tsv, items.tsv, config.yaml and run/; read only.

    Item i is followed by item i + 1, round and round.
    """
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(ITEMS + 1, 2, 8, generator=generator)
    states[0] = 0
    names = [f"b{i:02}" for i in range(ITEMS)]
    write_cache(folder / "cache", {"text": states}, item_names=names)
    (folder / "items.tsv").write_text("".join(f"{name}\tTitle {name}\n" for name in names))
    rows = [" ".join(names[(user * 5 + j) % ITEMS] for j in range(6 + user % 3)) for user in range(USERS)]
    (folder / "users.tsv").write_text("".join(f"u{user}\t{row}\n" for user, row in enumerate(rows)))
    config = {
        "cache": str(folder / "cache"),
        "users": str(folder / "users.tsv"),
        "items": str(folder / "items.tsv"),
        "run": str(folder / "run"),
        "model": {"embedding_dim": 16, "bottleneck": 4, "window": 5, "blocks": 1, "dropout": 0.0},
        # Sequences are certain: nothing is to be held small of the ids of the baseline.
        "optimizer": {"learning_rate": 1e-2, "id_weight_decay": 0.0},
        "batch_size": 10,
        "epochs": 15,
        "backend": "eager",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "config.yaml"), "--quiet"]) == 0
    return folder
