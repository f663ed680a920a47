"""Where a model's states come from: what is asked, and what is moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, _sources

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


class Placed:
    """What `_sources` asks of a cache, and the devices that it was sent to."""

    def __init__(self, device: torch.device, tier: str) -> None:
        self.device, self.tier = device, tier
        self.sent: list[torch.device] = []

    def to(self, device: torch.device) -> None:
        self.sent.append(device)
        self.device = device


@pytest.mark.parametrize(
    ("held", "tier", "asked", "expected"),
    [
        (CPU, "mmap", CPU, True),
        (GPU, "pinned", CPU, True),
        (GPU, "resident", GPU, True),
        (GPU, "pinned", GPU, False),
        (GPU, "mmap", GPU, False),
        (CPU, "resident", GPU, False),
        (OTHER, "resident", GPU, False),
    ],
)
def test_a_question_moves_nothing(held: torch.device, tier: str, asked: torch.device, expected: bool) -> None:
    cache: Any = Placed(held, tier)
    assert _sources.read_by_id(cache, asked) is expected
    assert cache.sent == []
    _sources.place(cache, asked)
    _sources.place(cache, asked)
    assert cache.sent == ([asked] if asked.type != "cpu" and asked != held else [])


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_a_model_places_the_cache_before_it_reads(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(7, 2, 6)
    states[0] = 0
    cache = HiddenStateCache.from_tensors({"text": states})
    sizes = {"embedding_dim": 4, "bottleneck": 2, "window": 4, "loss": loss}
    model = CrossanModel(CrossanConfig.from_dict({"modalities": [Modality("text", 6, 2)], **sizes}))
    model.set_popularity(torch.ones(7))
    placed: list[torch.device] = []
    monkeypatch.setattr(_sources, "place", lambda cache, device: placed.append(device))
    ids = torch.tensor([[1, 2, 3], [0, 4, 5]])
    model(ids, cache=cache)
    assert placed == [CPU]
    model.encode_catalogue(cache)
    assert placed == [CPU, CPU]
