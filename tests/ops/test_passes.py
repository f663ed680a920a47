"""Each pass by a backend of its own, where backends keep the same between the passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from crossan_fast.ops import _dispatch, _passes
from crossan_fast.ops._dispatch import Implementation
from crossan_fast.ops._passes import Passes

GPU = "Some GPU"


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Plants Triton and CUDA kernels that serve everything, on a GPU whose table is empty."""
    monkeypatch.delenv("CROSSAN_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_passes, "TABLE", tmp_path / "gpu_passes.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(_dispatch, "_choose", _dispatch._choose.__wrapped__)  # nothing is remembered

    def plant(**refusals: str | None) -> None:
        found = {
            name: Implementation(
                print,
                print,
                lambda request, name=name: refusals.get(name),
                "not yet measured" if name == "cuda" else None,
            )
            for name in ("triton", "cuda")
        }
        monkeypatch.setattr(_dispatch, "_find", lambda op, backend: found[backend])

    _passes.table.cache_clear()
    plant()
    yield plant
    _passes.table.cache_clear()


def choose(op: str = "side_network", backend: str = "auto") -> _dispatch.Choice:
    return _dispatch.choose(op, "cuda", torch.bfloat16, (), backend)


def test_the_estimate_stands_until_there_is_a_measurement(backends: Callable[..., None]) -> None:
    choice = choose()
    assert (choice.backend, choice.backward, choice.passes) == ("triton", "cuda", "triton/cuda")
    assert "its backward by cuda: by estimate" in choice.reason and "not yet measured" in choice.reason
    _passes.record(GPU, "side_network", Passes("triton", "triton", "measured so"))
    assert choose().passes == "triton"
    _passes.record(GPU, "side_network", Passes("cuda", "triton", "measured so"))
    assert choose().passes == "cuda/triton" and choose().reason.endswith("by triton: measured so")
    _passes.record("Another GPU", "side_network", Passes("cuda", "cuda", "measured so"))
    assert choose().passes == "cuda/triton", "of another GPU"


def test_a_backend_asked_for_by_name_runs_both_passes(
    backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(backend="triton").passes == "triton" and choose(backend="cuda").passes == "cuda"
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "triton")
    assert choose().passes == "triton"


def test_a_backward_that_can_not_serve_is_the_forwards(backends: Callable[..., None]) -> None:
    backends(cuda="nvcc is missing")
    choice = choose()
    assert choice.passes == "triton" and ("cuda backward", "nvcc is missing") in choice.rejected
    backends(triton="no Triton")
    with pytest.warns(_dispatch.FallbackWarning, match="cuda: not yet measured"):
        assert choose().passes == "eager"


def test_other_ops_and_devices_have_one_backend(backends: Callable[..., None]) -> None:
    assert choose("fusion").passes == "triton"
    assert _dispatch.choose("side_network", "cpu", torch.float64, ("states_grad",), "eager").passes == "eager"


def test_names() -> None:
    for forward, backward in (("triton", "cuda"), ("cuda", "cuda")):
        name = _passes.joined(forward, backward)
        assert (_passes.of(name, "forward"), _passes.of(name, "backward")) == (forward, backward)
    assert _passes.joined("cuda", "cuda") == "cuda"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"g": {"side_network": {"forward": "triton"}}}']
    + [
        json.dumps({"g": {op: {"forward": "triton", "backward": b, "reason": ""}}})
        for op, b in (("side_network", "cpp"), ("fusion", "cuda"))
    ],
)
def test_a_broken_table_is_named(backends: Callable[..., None], text: str) -> None:
    _passes.TABLE.write_text(text)
    with pytest.raises(ValueError, match=r"gpu_passes\.json"):
        choose()
