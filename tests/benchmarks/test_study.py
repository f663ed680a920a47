"""The papers' table: methods differ by how they encode items alone, costs are counted, rows are kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.__main__ import main
from benchmarks.recipes.tabulate import read
from benchmarks.study import learning, measure, run, table
from benchmarks.study.adaptation import BOTTLENECK, RANK, adapt
from benchmarks.study.methods import METHODS, config_of, make_model, trainable
from benchmarks.study.models import LiveModel, TrainedModel
from benchmarks.study.table import Cost, tpme
from benchmarks.study.worlds import SIZES, World, make_world, open_world
from crossan_fast.model import CrossanModel
from crossan_fast.training import Batches, TrainStep, make_optimizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_world(SIZES["tiny"], folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def world(work: Path) -> World:
    return open_world(SIZES["tiny"], work / "tiny", torch.device("cpu"))


def first_batch(world: World) -> torch.Tensor:
    return next(Batches(world.split.train, world.size.batch_size, 0).epoch(1))


def needs_peft(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")


def test_tpme_by_hand() -> None:
    costs = {
        "dear": Cost(100.0, 1000.0, 40.0),
        "middle": Cost(25.0, 100.0, 30.0),
        "cheap": Cost(0.0, 0.0, 20.0),
    }
    found = tpme(costs)
    assert found["dear"] == pytest.approx(1) and found["cheap"] == 0
    assert found["middle"] == pytest.approx(0.45 * 0.25 + 0.1 * 0.1 + 0.45 * 0.5)
    assert tpme({"one": Cost(3, 3, 3), "other": Cost(3, 3, 3)}) == {"one": 0, "other": 0}


@pytest.mark.parametrize("name", METHODS)
def test_methods_differ_by_how_they_encode_items_alone(name: str, world: World) -> None:
    needs_peft(name)
    method = METHODS[name]
    model = make_model(method, world, 0)
    # The loss and what it reads are CrossanModel's own, whatever the method.
    for own in ("forward", "encode_users", "_log_popularity", "encode_catalogue"):
        assert getattr(type(model), own) is getattr(CrossanModel, own)
    shared, reference = config_of(method, world), config_of(METHODS["crossan_fast"], world)
    for field in ("modalities", "embedding_dim", "window", "blocks", "attention_heads", "dropout", "loss"):
        assert getattr(shared, field) == getattr(reference, field)
    settings = method.optimizer()
    assert settings == type(settings)(learning_rate=1e-3, side_network=method.rate)
    step = TrainStep(model, world.cache, make_optimizer(model, settings), settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert step(first_batch(world)).isfinite()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert not moved & frozen and any(key.startswith("sequence_encoder") for key in moved)
    if isinstance(model, LiveModel):  # frozen encoders: in evaluation mode, too
        assert {key for key in before if key.startswith("backbones")} <= frozen
        assert not any(module.training for module in model.backbones.modules())
    elif isinstance(model, TrainedModel):
        assert any(key.startswith("towers") for key in moved)


def test_trained_parameters_are_those_of_the_method(world: World) -> None:
    pytest.importorskip("peft")
    found = {}
    for how in ("full", "bitfit", "lora", "houlsby"):
        backbone = world.backbones()["text"]
        shapes = {name: p.shape for name, p in backbone.model.named_parameters()}
        adapted = adapt(backbone.model, how)
        found[how] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    norms = sum(s.numel() for name, s in shapes.items() if "LayerNorm" in name)
    width, layers = 64, 4
    assert found["full"] == sum(s.numel() for s in shapes.values())
    assert found["bitfit"] == sum(s.numel() for name, s in shapes.items() if name.endswith("bias"))
    assert found["lora"] == 2 * layers * RANK * (width + width)
    a_bottleneck = 2 * width * BOTTLENECK + BOTTLENECK + width
    assert found["houlsby"] == 2 * layers * a_bottleneck + norms


def test_an_image_encoder_takes_every_method(world: World) -> None:
    pytest.importorskip("peft")
    width, layers = 64, 4
    lora = adapt(world.backbones()["image"].model, "lora")
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert trained == 2 * layers * RANK * 2 * width
    houlsby = adapt(world.backbones()["image"].model, "houlsby")
    assert sum(type(module).__name__ == "Bottleneck" for module in houlsby.modules()) == 2 * layers


def test_an_encoder_without_known_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="found none in Linear"):
        adapt(torch.nn.Linear(2, 2), "houlsby")


@pytest.mark.parametrize("what", ["iisan", "crossan"])
def test_uncached_is_cached_to_rounding(what: str, world: World) -> None:
    """The library's cache and its batches of other lengths, against the study's own run of the encoders."""
    cached = make_model(METHODS[f"{what}_fast"], world, 0).eval()
    live = make_model(METHODS[f"{what}_uncached"], world, 0).eval()
    missing = live.load_state_dict(cached.state_dict(), strict=False).missing_keys
    assert all(key.startswith("backbones") for key in missing)
    ids = first_batch(world)
    losses = []
    for model in (cached, live):
        losses.append(model(ids, cache=world.cache).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for (name, mine), theirs in zip(cached.named_parameters(), live.parameters(), strict=False):
        assert mine.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        cached.encode_catalogue(world.cache), live.encode_catalogue(world.cache), rtol=1e-4, atol=1e-5
    )


def test_eager_and_fast_are_one_model(world: World) -> None:
    losses = []
    for name in ("crossan_eager", "crossan_fast"):
        model = make_model(METHODS[name], world, 0).eval()
        losses.append(model(first_batch(world), cache=world.cache).loss)
        assert trainable(model) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_the_tiny_study_end_to_end(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = ["study", "--size", "tiny", "--work", str(work), "--output", str(tmp_path), "--device", "cpu"]
    some = [*command, "--methods", "bitfit,iisan_uncached,iisan_eager,crossan_fast,iisan_fast,sasrec_id"]
    assert main(some) == 0
    path = tmp_path / "study-tiny.csv"
    rows = read(path)
    keys = [(row["phase"], row["method"]) for row in rows]
    timed = ["bitfit", "iisan_uncached", "iisan_eager", "iisan_fast", "crossan_fast", "sasrec_id"]
    assert sorted(keys) == sorted(
        [("time", name) for name in timed]
        + [("accuracy", name) for name in ("bitfit", "iisan_fast", "crossan_fast", "sasrec_id")]
    )
    for row in rows:
        if row["phase"] == "time":
            assert float(row["step_s"]) > 0 and int(row["trainable"]) > 0
            assert int(row["memory_bytes"]) == sum(
                int(row[key]) for key in ("held_bytes", "states_bytes", "step_bytes")
            )
        else:
            assert 0 <= float(row["test_ndcg@10"]) <= float(row["test_hr@10"]) <= 1
    written = (tmp_path / "study-tiny.md").read_text()
    assert "| IISAN, cached, eager |" in written and "as IISAN, cached, fast" in written
    assert "| Full fine-tuning | 443 | 46.76 | 195 |" in written and "theirs" in written
    assert (tmp_path / "study-tiny.png").read_bytes().startswith(b"\x89PNG")
    # What is there is not made again, unless it is asked for.
    capsys.readouterr()
    assert main(some) == 0 and "0 rows to make" in capsys.readouterr().out
    assert read(path) == rows
    assert main([*command, "--only", "time", "--methods", "sasrec_id", "--again"]) == 0
    assert len(read(path)) == len(rows) + 1
    # Times are a device's own; accuracy is not.
    assert {key[0] for key in run.recorded(path, "another")} == {"accuracy"}


def test_another_precision_is_learned_in_and_said(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ["study", "--size", "tiny", "--work", str(work), "--output", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--methods", "crossan_fast", "--precision", "bf16"]) == 0
    time, accuracy = read(tmp_path / "study-tiny.csv")
    assert (time["phase"], time["precision"]) == ("time", "fp32")
    assert (accuracy["phase"], accuracy["precision"]) == ("accuracy", "bf16")
    assert "2 epochs, bf16" in (tmp_path / "study-tiny.md").read_text()


def test_a_training_that_was_cut_off_goes_on_bit_for_bit(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = open_world(SIZES["tiny"], work / "tiny", torch.device("cpu"))
    method, limits = METHODS["crossan_fast"], measure.Limits(1, 4, 4)
    folder = learning.folder_of(method, world, 7)

    def kept() -> dict[str, torch.Tensor]:
        return {f"{file.name} {name}": t for file in folder.iterdir() for name, t in load_file(file).items()}

    whole, weights = measure.accuracy_row(method, world, 7, limits), kept()
    shutil.rmtree(folder)
    save = learning.save_checkpoint

    def cut_off(path: Path, *state: Any) -> None:
        if state[2]["epoch"] == 4:  # behind the best weights, before the state that names them
            raise KeyboardInterrupt
        save(path, *state)

    with monkeypatch.context() as patched:
        patched.setattr(learning, "save_checkpoint", cut_off)
        with pytest.raises(KeyboardInterrupt):
            measure.accuracy_row(method, world, 7, limits)
    capsys.readouterr()
    gone_on = measure.accuracy_row(method, world, 7, limits)
    assert "a training of 2 epochs goes on" in capsys.readouterr().err
    assert float(gone_on.pop("learned_s")) > 0 and float(whole.pop("learned_s")) > 0
    assert gone_on == whole and whole["learned_epochs"] == 4
    found = kept()
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in found)
    # What has come to its end is taken as it is, and said to be; for more epochs it goes on.
    again = measure.accuracy_row(method, world, 7, limits)
    assert "a training of 4 epochs is taken as it is" in capsys.readouterr().err
    assert {**again, "learned_s": None} == {**gone_on, "learned_s": None}
    longer = measure.accuracy_row(method, world, 7, replace(limits, epochs=6))
    assert "a training of 4 epochs goes on" in capsys.readouterr().err and longer["learned_epochs"] == 6
    with pytest.raises(ValueError, match=r"expected a training under .*'learning_rate': 0.001.*without that"):
        measure.accuracy_row(replace(method, rate=0.5), world, 7, limits)


def test_a_part_of_an_epoch_is_judged_but_not_gone_on_from(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = open_world(SIZES["tiny"], work / "tiny", torch.device("cpu"))
    method = METHODS["bitfit"]
    an_epoch = len(Batches(world.split.train, world.size.batch_size, 8))
    found = measure.accuracy_row(method, world, 8, measure.Limits(1, 2 * an_epoch + 1, 9))
    assert found["learned_steps"] == 2 * an_epoch + 1
    assert capsys.readouterr().err.count("validation NDCG@10") == 2
    longer = measure.accuracy_row(method, world, 8, measure.Limits(1, 4 * an_epoch, 9))
    assert "a training of 2 epochs goes on" in capsys.readouterr().err
    assert longer["learned_epochs"] == 4


def test_wrong_wishes_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study", "--methods", "fft,lorra", "--output", str(tmp_path)]) == 2
    assert "unknown ['lorra']" in capsys.readouterr().err
    assert main(["study", "--size", "paper", "--only", "accuracy", "--output", str(tmp_path)]) == 2
    assert "phases ['time']" in capsys.readouterr().err
    missing = ["--size", "minilm", "--data", str(tmp_path / "none"), "--work", str(tmp_path / "work")]
    assert main(["study", *missing, "--output", str(tmp_path)]) == 2
    assert "scientific4k" in capsys.readouterr().err and not (tmp_path / "work" / "minilm").exists()


@pytest.mark.long
def test_a_method_that_fails_in_its_own_process_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_world", lambda *arguments: None)
    command = ["study", "--size", "minilm", "--methods", "sasrec_id", "--only", "time"]
    assert main([*command, "--work", str(tmp_path / "none"), "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.glob("*.csv"))


def test_claims_are_judged_by_ratios() -> None:
    costs = {"crossan_fast": Cost(1, 1, 10), "fft": Cost(30, 9, 40), "iisan_eager": Cost(2, 9, 20)}
    lines = table._claims(costs)
    assert "| Full fine-tuning | 1/30.0 | ≤ 1/20: met | 1/4.0 | ≤ 1/5: **missed** |" in lines
    assert "| IISAN, cached, eager | 1/2.0 | ≤ 1/1.43: met | 1/2.0 | ≤ 1/1.25: met |" in lines


def test_accuracies_that_were_still_rising_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {
        "phase": "accuracy",
        "seed": "0",
        "device": "a cpu",
        "threads": "1",
        "torch": "2",
        "commit": "c",
    }
    common |= {"precision": "fp32", "date": "2026-01-01", "users": "9", "candidates": "8"}
    common |= {"filter_history": "none", "test_ndcg@10": "0.1", "memory_bytes": "", "test_hr@10": "0.25"}
    rising = common | {"method": "crossan_fast", "learned_epochs": "8", "best_epoch": "8"}
    settled = common | {"method": "sasrec_id", "learned_epochs": "20.0", "best_epoch": "14"}
    assert [table.rising([row]) for row in (rising, settled)] == [True, False]
    page = table.markdown([rising, settled], "study-x")
    assert "| 25.00 | 10.00 | 8 epochs, still rising |" in page and "| 20 epochs |" in page
    from matplotlib.axes import Axes

    drawn: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: drawn.append(text))
    table.draw([rising, settled], tmp_path / "bars.png")
    assert [text for text in drawn if "still rising" in text] == [" 25 after 8 epochs, still rising"] * 3
    assert " 25" in drawn, "the settled one"


def test_the_papers_encoders_have_the_papers_parameters() -> None:
    """195 M with full fine-tuning, as the papers print it."""
    found = 0
    with torch.device("meta"):
        for config in (transformers.BertConfig(), transformers.ViTConfig()):
            model = transformers.AutoModel.from_config(config, add_pooling_layer=False)
            found += sum(p.numel() for p in adapt(model, "full").parameters())
    assert round(found / 1e6) == 195


def test_methods_are_compared_after_as_many_epochs() -> None:
    def row(method: str, epochs: str, best: str, hits: str) -> dict[str, str]:
        common = {"phase": "accuracy", "seed": "0", "precision": "fp32", "test_ndcg@10": "0.01"}
        return {**common, "method": method, "learned_epochs": epochs, "best_epoch": best, "test_hr@10": hits}

    rows = [
        row("crossan_fast", "40.0", "36", "0.11"),
        row("crossan_fast", "4.0", "2", "0.06"),
        row("fft", "8.0", "8", "0.07"),
        row("fft", "4.0", "4", "0.05"),
        row("lora", "4.0", "4", "0.03"),
        row("lora", "0.5", "1", "0.01"),
        row("sasrec_id", "20.0", "14", "0.08"),
        row("sasrec_id", "12.0", "6", "0.10"),
    ]
    # A training that ended by itself stands for an older one; one that was cut short for no longer one.
    shown = {name: [row["test_hr@10"] for row in found] for name, found in table.accuracies_of(rows).items()}
    assert shown == {"crossan_fast": ["0.11"], "fft": ["0.07"], "lora": ["0.03"], "sasrec_id": ["0.10"]}
    epochs, found = table.equally_long(rows)
    assert epochs == 4
    assert {name: [row["test_hr@10"] for row in of] for name, of in found.items()} == {
        "crossan_fast": ["0.06"],
        "fft": ["0.05"],
        "lora": ["0.03"],
    }
    costs = {"fft": Cost(600, 1, 1), "crossan_fast": Cost(5.5, 1, 1)}
    lines = table._compared_early(rows, costs)
    assert "| Full fine-tuning | 2,400 | 5.00 | 1.00 | fp32 |" in lines
    assert "| CROSSAN, cached, fast | 22 | 6.00 | 1.00 | fp32 |" in lines
    for few in (["sasrec_id", "crossan_fast"], ["fft"]):  # none that trains encoders, and nothing beside it
        assert table._compared_early([row(name, "4.0", "4", "0.1") for name in few], costs) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["crossan_fast", "crossan_uncached", "bitfit"])
def test_the_papers_size_steps(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The papers' encoders, on few items and users."""
    size, method = replace(SIZES["paper"], precision="fp32", batch_size=4), METHODS[name]
    folder = tmp_path_factory.getbasetemp() / "paper"
    make_world(size, folder, items=8, users=4)
    world = open_world(size, folder, torch.device("cpu"))
    model, settings = make_model(method, world, 0), method.optimizer()
    step = TrainStep(model, world.cache, make_optimizer(model, settings), settings)
    losses = [float(step(first_batch(world))) for _ in range(2)]
    assert all(loss == loss for loss in losses) and losses[0] != losses[1]
