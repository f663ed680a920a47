"""Saving, loading and pushing as Hugging Face's models do; the hub is a stub, its package the real one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.cache.writer import write_cache

FILES = ["config.json", "model.safetensors"]


def make_model() -> CrossanModel:
    torch.manual_seed(0)
    config = CrossanConfig(
        [Modality("text", 12, 2), Modality("image", 8, 2)], embedding_dim=16, bottleneck=4, window=4
    )
    model = CrossanModel(config, backend="eager")
    model.set_popularity(torch.arange(10))
    return model


def equal(one: CrossanModel, other: CrossanModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of huggingface_hub fails, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("offline")
def test_a_path_is_read_without_the_hub(here: Path) -> None:
    model = make_model()
    model.save_pretrained("models/a")
    for name in ("models/a", "./models/a", "models/a/", here / "models" / "a", Path("models/a")):
        assert equal(CrossanModel.from_pretrained(name), model)


@pytest.mark.usefixtures("offline")
def test_what_can_only_be_a_path_is_said_at_once(here: Path) -> None:
    make_model().save_pretrained("models/best")
    for name, message in (
        ("models/bets", r"no such folder: models/bets; did you mean models/best\?"),
        ("models/zz", "no such folder: models/zz; models is a folder here, so that the hub was not asked"),
        ("model/best/", r"no such folder: model/best/; did you mean models/best\?"),
        ("model/best/x", "no such folder: model/best/x$"),
        ("./nowhere", "no such folder: ./nowhere$"),
        ("../nowhere", "no such folder: ../nowhere$"),
        ("~/no/where/at/all", "no such folder: ~/no/where/at/all$"),
        ("/no/where", "no such folder: /no/where$"),
        ("best/", "no such folder: best/$"),
        ("nowhere", "no such folder: nowhere$"),
        (Path("some/where"), "no such folder: some/where$"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            CrossanModel.from_pretrained(name)
    with pytest.raises(NotADirectoryError, match=r"expected a folder, got the file models/best/config.json"):
        CrossanModel.from_pretrained("models/best/config.json")
    with pytest.raises(ImportError, match=r"needs the package huggingface_hub.*crossan-fast\[hub\]"):
        CrossanModel.from_pretrained("owner/name")


@pytest.mark.usefixtures("offline")
def test_a_run_names_the_folder_of_its_model(here: Path) -> None:
    make_model().save_pretrained("runs/a/best")
    with pytest.raises(
        FileNotFoundError, match=r"it is a run, expected the folder of its model: runs/a/best$"
    ):
        CrossanModel.from_pretrained("runs/a")
    with pytest.raises(FileNotFoundError, match=r"it holds runs, expected .*: runs/a/best$"):
        CrossanModel.from_pretrained("runs")
    (here / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected config.json in empty, found none$"):
        CrossanModel.from_pretrained("empty")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16", "auto", None, "float64"])
def test_parameters_have_the_type_that_was_asked_for(tmp_path: Path, dtype: Any) -> None:
    model = make_model()
    model.bfloat16().save_pretrained(tmp_path)
    loaded = CrossanModel.from_pretrained(tmp_path, dtype=dtype, backend="eager")
    want = {None: torch.float32, "float64": torch.float64}.get(dtype, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {want}
    assert loaded.item_popularity.dtype == torch.float32, "shares of rare items do not fit into bf16"
    assert all(p.requires_grad for p in loaded.parameters())
    states = {name: torch.randn(3, 2, width) for name, width in (("text", 12), ("image", 8))}
    assert loaded.encode_items(states).dtype == want


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_model_in_bf16_trains_and_recommends_near_one_in_fp32(tmp_path: Path, backend: str) -> None:
    make_model().save_pretrained(tmp_path / "model")
    states = {name: torch.randn(10, 2, width) for name, width in (("text", 12), ("image", 8))}
    for state in states.values():
        state[0] = 0
    write_cache(tmp_path / "cache", states, item_names=[f"item{i}" for i in range(1, 10)])
    cache = HiddenStateCache.open(tmp_path / "cache")
    ids = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 9], [0, 0, 0, 8, 7]])
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = CrossanModel.from_pretrained(tmp_path / "model", dtype=dtype, backend=backend).eval()
        out = model(ids, cache=cache)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
        assert len(model.recommend([["item1", "item2"]], cache, k=3)[0]) == 3
        losses.append(float(out.loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dtype: expected one of auto, float32, .* got 'bfloat61'; did you"):
        CrossanModel.from_pretrained(tmp_path, dtype="bfloat61")
    with pytest.raises(ValueError, match=r"dtype: expected one of .* got torch\.int8"):
        CrossanModel.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"revison: expected one of .*; did you mean 'revision'"):
        CrossanModel.from_pretrained(tmp_path, revison="main")
    with pytest.raises(ValueError, match=r"repo_id: goes with push_to_hub=True"):
        model.save_pretrained(tmp_path, repo_id="owner/name")


def test_a_repository_is_downloaded_and_read_with_every_refusal(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.save_pretrained("downloaded")
    calls = []

    def download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        return "downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = CrossanModel.from_pretrained("owner/name", revision="v1", token=False)
    assert equal(loaded, model)
    ((repository, options),) = calls
    assert repository == "owner/name"
    assert {"revision": "v1", "token": False}.items() <= options.items()
    assert set(FILES) <= set(options["allow_patterns"])
    assert not any("*" in name for name in options["allow_patterns"]), "nothing else is fetched"
    weights = Path("downloaded/model.safetensors")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"damaged"):
        CrossanModel.from_pretrained("owner/name")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors"):
        CrossanModel.from_pretrained("owner/name")


@pytest.mark.usefixtures("here")
def test_what_the_hub_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\n\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder owner/name here, and from the hub: LocalEntryNotFoundError: Cannot .* folder.$",
    ):
        CrossanModel.from_pretrained("owner/name", local_files_only=True)


def test_the_real_download_offline_says_so_at_once(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder owner/name here, and from the hub: LocalEntry"):
        CrossanModel.from_pretrained("owner/name", local_files_only=True, cache_dir=str(here / "hub"))


class Api:
    """What `ModelHubMixin.push_to_hub` asks of the hub."""

    def __init__(self, kept: Path) -> None:
        self.kept, self.calls = kept, []

    def __call__(self, token: Any = None) -> Api:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", repo_id, options))
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.kept)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    stub = Api(tmp_path / "pushed")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", stub)
    return stub


def test_a_push_goes_through_the_mixin(api: Api) -> None:
    model = make_model()
    address = model.push_to_hub("owner/name", private=True, commit_message="First")
    assert address == "https://hub/owner/name/commit/1"
    assert [call[:2] for call in api.calls] == [("create", "owner/name"), ("upload", "owner/name")]
    assert api.calls[0][2]["private"] is True
    assert api.calls[1][2]["commit_message"] == "First"
    assert equal(CrossanModel.from_pretrained(api.kept), model)
    assert json.loads((api.kept / "config.json").read_text()) == model.config.to_dict()


def test_a_save_may_push(api: Api, here: Path) -> None:
    make_model().save_pretrained("mine", push_to_hub=True)
    assert api.calls[0][1] == "mine"
    assert {p.name for p in Path("mine").iterdir()} <= {p.name for p in api.kept.iterdir()}


def test_what_is_not_finite_is_not_pushed(api: Api) -> None:
    model = make_model()
    with torch.no_grad():
        model.fusion.router.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"fusion.router.bias: expected finite values to save"):
        model.push_to_hub("owner/name")
    assert "upload" not in [call[0] for call in api.calls]
