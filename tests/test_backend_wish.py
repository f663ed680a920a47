"""A backend asked for by name holds for every op that has it, wherever the op is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import crossan_fast
from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, ops
from crossan_fast.data import build_interactions, leave_one_out
from crossan_fast.ops import _dispatch
from crossan_fast.training import evaluate

PACKAGE = Path(crossan_fast.__file__).parent
# Ranks by popularity: nobody has asked for a backend there.
WITHOUT_A_MODEL = "cli/demo.py"
ITEMS, WINDOW = 12, 4


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a dispatched op outside `ops/`, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "ops":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            of_ops = isinstance(called, ast.Attribute) and getattr(called.value, "id", None) == "ops"
            name = called.attr if of_ops else getattr(called, "id", None)
            if name in _dispatch.OPS:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {name}", node


def test_every_call_of_an_op_passes_a_backend() -> None:
    found = dict(calls())
    # The cache asks for gather_convert by `staging.gather_kernel`, for whatever the environment wishes.
    assert {place.split()[-1] for place in found} == set(_dispatch.OPS) - {"gather_convert"}
    without = [place for place, call in found.items() if "backend" not in {k.arg for k in call.keywords}]
    assert not [place for place in without if not place.startswith(WITHOUT_A_MODEL)]


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_eager_by_name_is_eager_everywhere(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    whole = _dispatch._choose

    def choose(request: _dispatch.Request, wanted: str) -> _dispatch.Choice:
        asked.append((request.op, wanted))
        return whole(request, wanted)

    monkeypatch.setattr(_dispatch, "_choose", choose)
    monkeypatch.delenv("CROSSAN_FAST_BACKEND", raising=False)
    states = torch.randn(ITEMS + 1, 2, 6)
    states[0] = 0
    cache = HiddenStateCache.from_tensors({"text": states}, item_names=[f"n{i}" for i in range(ITEMS)])
    sizes = {"embedding_dim": 4, "bottleneck": 2, "window": WINDOW, "loss": loss}
    config = CrossanConfig.from_dict({"modalities": [Modality("text", 6, 2)], **sizes})
    model = CrossanModel(config, backend="eager")
    ids = torch.arange(1, 11).view(2, 5)
    model.set_popularity(torch.ones(ITEMS + 1))
    model(ids, cache=cache).loss.backward()
    model.recommend([["n1"]], cache, k=2)
    sequences = {user: [f"n{i}" for i in range(first, first + 6)] for user, first in (("a", 0), ("b", 6))}
    split = leave_one_out(build_interactions(sequences, cache.item_names, catalogue="all"), WINDOW)
    evaluate(model, cache, split, k=(1,))
    assert {"topk_scores", "rank_of_target", "side_network"} <= {op for op, _ in asked}
    assert {wanted for _, wanted in asked} == {"eager"}


def test_a_wish_for_the_models_device_does_not_reach_the_host() -> None:
    config = CrossanConfig([Modality("text", 6, 2)])
    host, elsewhere = torch.device("cpu"), torch.device("meta")
    for backend in ("auto", "eager", "cpp", "triton"):
        model = CrossanModel(config, backend=backend)
        assert model.backend_for("deduplicate", host) == model.backend_for("deduplicate")
        assert model.backend_for("deduplicate", elsewhere) == ("eager" if backend == "eager" else "auto")
        assert model.backend_for("topk_scores") == (
            backend if ops.has_kernel("topk_scores", backend) else "auto"
        )
