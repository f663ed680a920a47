"""The encoders outside this library, by torch.export and in onnxruntime, against the model; embeddings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, Modality
from crossan_fast.export import ITEMS, USERS, export_items, export_users, write_embeddings, write_onnx

MODALITIES = [Modality("text", 12, 2), Modality("image", 20, 2), Modality("audio", 8, 2)]
CONFIGS: dict[str, Any] = {
    "momef": CrossanConfig(MODALITIES, embedding_dim=16, bottleneck=4, window=4),
    "top_k": CrossanConfig(MODALITIES, embedding_dim=16, bottleneck=4, window=4, top_k=2, load_balance=0.1),
    "side": CrossanConfig(MODALITIES[:2], embedding_dim=16, bottleneck=4, window=4, cross="side"),
    "one modality": CrossanConfig(MODALITIES[:1], embedding_dim=8, bottleneck=4, window=1),
    "iisan": CrossanConfig.iisan(MODALITIES[:2], embedding_dim=16, bottleneck=4, window=4),
}


def make_model(config: str, backend: str = "auto") -> CrossanModel:
    torch.manual_seed(0)
    model = CrossanModel(CONFIGS[config], backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "experts" in name or "router" in name or "cross" in name:
                parameter.normal_(std=0.3)
    return model


def item_inputs(model: CrossanModel, count: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(count)
    states = {
        m.name: torch.randn(count, m.levels, m.width, generator=generator) for m in model.config.modalities
    }
    present = torch.rand(count, len(states), generator=generator) < 0.6
    present[:, 0] |= ~present.any(dim=1)
    return states, present


def histories(model: CrossanModel) -> Iterator[tuple[Tensor, Tensor]]:
    config = model.config
    for users, places in ((1, config.window), (5, config.window), (3, 1), (2, min(3, config.window))):
        lengths = torch.arange(users) % places + 1
        mask = torch.arange(places) >= places - lengths[:, None]
        yield torch.randn(users, places, config.embedding_dim), mask


@pytest.mark.sweep(1)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_torch_exports_is_the_model_at_any_size(config: str) -> None:
    model = make_model(config).train()
    items, users = export_items(model), export_users(model)
    assert model.training and model.towers.training, "as it was"
    for program in (items, users):
        assert not any("crossan_fast" in str(node.target) for node in program.graph.nodes)
    export_users(model.eval())
    assert not model.training and not model.towers.training, "as it was"
    with torch.no_grad():
        for count in (1, 2, 7):
            inputs = item_inputs(model, count)
            torch.testing.assert_close(items.module()(*inputs), model.encode_items(*inputs))
        for embeddings, mask in histories(model):
            want = model.encode_users(embeddings, mask)[:, -1]
            torch.testing.assert_close(users.module()(embeddings, mask), want)


def test_items_by_states_alone_have_no_vectors_of_their_own() -> None:
    plain = CONFIGS["momef"]
    model = CrossanModel(replace(plain, id_embedding=True, id_fusion="sum"))
    with pytest.warns(UserWarning, match="export: items are made of their states alone.*id_embedding"):
        items = export_items(model)
    inputs = item_inputs(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(items.module()(*inputs), model.encode_items(*inputs))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("backend", ["cpp", "eager", "triton", "cuda"])
def test_it_is_plain_torch_under_any_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, model = make_model("momef", "eager"), make_model("momef", backend)
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", backend)
    inputs = item_inputs(model, 3)
    have = export_items(model).module()(*inputs)
    torch.testing.assert_close(have, wanted.encode_items(*inputs))


_WITHOUT_US = """
import sys, torch
sys.modules["crossan_fast"] = None
program = torch.export.load(sys.argv[1])
print(torch.load(sys.argv[2]).allclose(program.module()(*torch.load(sys.argv[3])), atol=1e-5))
"""


def test_it_runs_where_this_library_is_not(tmp_path: Path) -> None:
    model = make_model("momef", "eager").eval()
    inputs = item_inputs(model, 5)
    torch.export.save(export_items(model), tmp_path / "items.pt2")
    torch.save(model.encode_items(*inputs).detach(), tmp_path / "want.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("items.pt2", "want.pt", "inputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, *files], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "True"


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS)
def test_onnxruntime_computes_what_the_model_does(config: str, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = make_model(config).eval()
    write_onnx(model, tmp_path / "onnx")
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == [ITEMS, USERS]
    items, users = (runtime.InferenceSession(tmp_path / "onnx" / name) for name in (ITEMS, USERS))
    assert {i.name for i in items.get_inputs()} == {*model.config.modality_names, "present"}
    for count in (1, 2, 7):
        states, present = item_inputs(model, count)
        feed = {name: state.numpy() for name, state in states.items()} | {"present": present.numpy()}
        (have,) = items.run(["embeddings"], feed)
        want = model.encode_items(states, present).detach()
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-5, atol=2e-6)
    for embeddings, mask in histories(model):
        (have,) = users.run(["users"], {"items": embeddings.numpy(), "mask": mask.numpy()})
        want = model.encode_users(embeddings, mask)[:, -1].detach()
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-5, atol=2e-6)


def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnx: expected the packages .*crossan-fast\[export\]"):
        write_onnx(make_model("momef"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_embeddings_need_a_name_each(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names: expected one for each of 3 rows, got 2"):
        write_embeddings(tmp_path / "a.npy", ["a", "b"], torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected a name that ends with .npy or .parquet, got .*a.csv"):
        write_embeddings(tmp_path / "a.csv", ["a"], torch.zeros(1, 2))
    assert not list(tmp_path.iterdir())
