"""The loop learns, stops, writes what it says, and goes on bit for bit."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crossan_fast._digests import KEY, load_tensors, save_tensors, unsealed
from crossan_fast._files import write_whole
from crossan_fast.training import RunFolder, TrainConfig, Trainer, TrainingError, TrainStep, train
from crossan_fast.training.checkpoint import load_checkpoint, save_checkpoint


def quiet(config: TrainConfig, **options: Any) -> Trainer:
    made = Trainer(config)
    made.fit(progress=False, say=lambda line: None, **options)
    return made


def with_values(values: dict[str, Any], **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**values, **changes})


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss", ["in_batch", "full", "sampled", "prefixes"])
def test_training_learns_the_ring(values: dict[str, Any], loss: str) -> None:
    values["model"] |= {"loss": "in_batch" if loss == "prefixes" else loss, "dropout": 0.0}
    if loss == "sampled":
        values["model"] |= {"negatives": 20}
    if loss == "prefixes":
        values["model"] |= {"targets": "last"}
        values["split"] = {"stride": "prefixes"}
    results = train(with_values(values, epochs=25), progress=False)
    assert results["test"]["metrics"]["hr@10"] > 0.9, "chance is about a third"
    assert results["test"]["split"] == "test"


def test_the_run_folder_may_lie_below_home_or_data(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Trainer(with_values(values, run="~/a")).folder.path == tmp_path / "home" / "a"
    data = str(tmp_path / "data")
    assert Trainer(with_values(values, run="${data}/b", data=data)).folder.path == tmp_path / "data" / "b"


def test_the_run_folder_holds_everything(values: dict[str, Any]) -> None:
    config = with_values(values, epochs=2)
    lines: list[str] = []
    trainer = Trainer(config)
    results = trainer.fit(progress=False, say=lines.append)
    folder = RunFolder(config.run)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "best",
        "config.yaml",
        "last.safetensors",
        "log.jsonl",
        "population.json",
        "results.json",
    ]
    assert folder.read_config() == trainer.config
    assert yaml.safe_load(folder.config.read_text())["optimizer"]["eps"] == 1e-8, "defaults are written out"
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert len(lines) == 3
    assert f"loss {log[0]['loss']:.4f}" in lines[1]
    assert unsealed(json.loads(folder.results.read_text()), "results", folder.results) == results
    assert results["versions"]["torch"] == torch.__version__
    best = max(log, key=lambda entry: entry["validation"]["ndcg@10"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["metrics"] == best["validation"], "the best weights are what is tested"
    for name, value in folder.load_model("best").state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("loss", "ids"),
    [("in_batch", False), ("full", False), ("sampled", False), ("in_batch", True)],
    ids=["in_batch", "full", "sampled", "ids"],
)
def test_resuming_continues_bit_for_bit(values: dict[str, Any], tmp_path: Path, loss: str, ids: bool) -> None:
    """Weights, optimizer state, dropout's generator and the log: four epochs are two and two."""
    values["model"] |= {"loss": loss, "modality_dropout": 0.3, "load_balance": 0.1, "id_embedding": ids}
    values["optimizer"] |= {"average": 0.9}
    straight = with_values(values, epochs=4, run=str(tmp_path / "straight"))
    cut = with_values(values, epochs=2, run=str(tmp_path / "cut"))
    quiet(straight)
    quiet(cut)
    torch.rand(17)  # a new process would have drawn other numbers too
    quiet(with_values(values, epochs=4, run=str(tmp_path / "cut")), resume=True)
    assert_same_run(RunFolder(straight.run), RunFolder(cut.run), straight)


def test_an_epoch_that_was_cut_off_is_repeated(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = with_values(values, run=str(tmp_path / "straight"))
    cut = with_values(values, run=str(tmp_path / "cut"))
    quiet(straight)
    steps, whole = [], TrainStep.forward_backward

    def failing(self: TrainStep, item_ids: torch.Tensor, *ahead: Any) -> torch.Tensor:
        steps.append(item_ids)
        if len(steps) == 8:  # in the second of the epochs of 5 steps
            raise KeyboardInterrupt
        return whole(self, item_ids, *ahead)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "forward_backward", failing)
        quiet(cut)
    assert len(RunFolder(cut.run).log.read_text().splitlines()) == 1
    quiet(cut, resume=True)
    assert_same_run(RunFolder(straight.run), RunFolder(cut.run), straight)


def test_the_best_epoch_is_the_one_whose_weights_are_kept(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut off between best/ and last.safetensors may be resumed to end before that epoch."""
    cut = with_values(values, epochs=3, run=str(tmp_path / "cut"))
    kept = []

    def failing(*args: Any, **options: Any) -> None:
        kept.append(args)
        if len(kept) == 2:
            raise KeyboardInterrupt
        save_checkpoint(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("crossan_fast.training.trainer.save_checkpoint", failing)
        quiet(cut)
    with pytest.raises(ValueError, match=r"expected the weights of epoch 1, the best, in .*best, got others"):
        quiet(with_values(values, epochs=1, run=cut.run), resume=True)
    quiet(cut, resume=True)
    straight = with_values(values, epochs=3, run=str(tmp_path / "straight"))
    quiet(straight)
    assert_same_run(RunFolder(straight.run), RunFolder(cut.run), straight)


def assert_same_run(first: RunFolder, second: RunFolder, config: TrainConfig) -> None:
    states, progress, random = [], [], []
    for folder in (first, second):
        fresh = Trainer(config)
        average = fresh.step.average
        progress.append(load_checkpoint(folder.last, fresh.model, fresh.optimizer, average))
        random.append(torch.get_rng_state())
        states.append(
            {
                **fresh.model.state_dict(),
                **({f"average {name}": v for name, v in average.tensors().items()} if average else {}),
                **{
                    f"{name}:{entry}": value
                    for group in fresh.optimizer.param_groups
                    for name, parameter in zip(group["names"], group["params"], strict=True)
                    for entry, value in fresh.optimizer.state[parameter].items()
                },
            }
        )
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert torch.equal(*random)
    times = ("train_seconds", "evaluation_seconds")
    histories = [
        [{k: v for k, v in entry.items() if k not in times} for entry in state["history"]]
        for state in progress
    ]
    assert histories[0] == histories[1]
    assert progress[0]["steps"] == progress[1]["steps"] > 0
    results = [json.loads(folder.results.read_text()) for folder in (first, second)]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]


def test_equal_seeds_agree_and_others_differ(values: dict[str, Any], tmp_path: Path) -> None:
    def weights(seed: int, run: str) -> torch.Tensor:
        trainer = quiet(with_values(values, epochs=1, seed=seed, run=str(tmp_path / run)))
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    first = weights(1, "a")
    assert torch.equal(first, weights(1, "b"))
    assert not torch.equal(first, weights(2, "c"))


def test_early_stopping_counts_evaluations_without_a_better_one(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Validation NDCG@10 by epoch; ties are not better.
    planned = iter([0.2, 0.5, 0.4, 0.5, 0.1, 0.9])
    whole = Trainer.evaluate

    def evaluate(self: Trainer, part: Any) -> Any:
        result = whole(self, part)
        result.metrics["ndcg@10"] = next(planned)
        return result

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    trainer = Trainer(with_values(values, epochs=20, patience=3))
    monkeypatch.setattr(Trainer, "_finish", lambda self, stopped: {"stopped_by": stopped})
    results = trainer.fit(progress=False, say=lambda line: None)
    assert results["stopped_by"] == "patience"
    assert [entry["best_epoch"] for entry in trainer.history] == [1, 2, 2, 2, 2]


def test_evaluation_every_other_epoch_and_at_the_end(values: dict[str, Any]) -> None:
    trainer = quiet(with_values(values, epochs=3, evaluate_every=2))
    assert ["validation" in entry for entry in trainer.history] == [False, True, True]


def test_bf16_autocast_keeps_fp32_weights(values: dict[str, Any]) -> None:
    trainer = quiet(with_values(values, epochs=1, precision="bf16"))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    plain = quiet(with_values(values, epochs=1, run=values["run"] + "-fp32"))
    difference = abs(trainer.history[0]["loss"] - plain.history[0]["loss"])
    assert 0 < difference < 0.05, "computed in another type, to nearly the same loss"


def test_a_step_reads_nothing_back(config: TrainConfig) -> None:
    trainer = Trainer(config)
    batch = next(trainer.batches.epoch(1))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loss = trainer.step(batch)
    assert isinstance(loss, torch.Tensor)
    assert not loss.requires_grad
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_cut_offs_beyond_the_catalogue_give_way_to_the_largest_within(
    values: dict[str, Any], sizes: Any
) -> None:
    with pytest.warns(
        UserWarning, match=rf"evaluation\.k: expected cut-offs below .* got \[{sizes.items}\]; "
    ):
        trainer = Trainer(with_values(values, evaluation={"k": [5, sizes.items]}, epochs=1))
    metrics = trainer.fit(progress=False, say=lambda line: None)["test"]["metrics"]
    assert [name for name in metrics if "hr" in name] == ["hr@5", "hr@10", f"hr@{sizes.items - 1}"]


def test_a_catalogue_of_six_items_trains_by_the_cut_off_it_has(
    values: dict[str, Any], tmp_path: Path
) -> None:
    users = tmp_path / "six.tsv"
    rows = [" ".join(f"item{1 + (user + j) % 6}" for j in range(5)) for user in range(6)]
    users.write_text("".join(f"u{user}\t{row}\n" for user, row in enumerate(rows)))
    lines: list[str] = []
    with pytest.warns(
        UserWarning, match=r"evaluation\.k: .* below the 6 candidates, got \[10, 20\]; 5 stands"
    ):
        trainer = Trainer(with_values(values, users=str(users), epochs=2, batch_size=6))
    results = trainer.fit(progress=False, say=lines.append)
    assert trainer.monitor == "ndcg@5" and set(results["test"]["metrics"]) == {"hr@5", "ndcg@5", "mrr"}
    assert "validation HR@5" in lines[1] and "NDCG@5" in lines[1]


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(with_values(values, epochs=1))
    folder = RunFolder(values["run"])
    saved = folder.last.read_bytes()
    steps, whole = [], TrainStep.forward_backward

    def poisoned(self: TrainStep, item_ids: torch.Tensor, *ahead: Any) -> torch.Tensor:
        steps.append(item_ids)
        loss = whole(self, item_ids, *ahead)
        return loss * torch.nan if len(steps) == 4 else loss

    monkeypatch.setattr(TrainStep, "forward_backward", poisoned)
    with pytest.raises(TrainingError, match=r"loss: nan at step 4 of epoch 2; a smaller optimizer\.learning"):
        quiet(with_values(values, epochs=2), resume=True)
    assert folder.last.read_bytes() == saved


def test_a_full_disk_leaves_the_old_checkpoint(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(with_values(values, epochs=1))
    folder = RunFolder(values["run"])
    saved, whole = folder.last.read_bytes(), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if folder.last.name in self.name:
            whole(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        quiet(with_values(values, epochs=2), resume=True)
    assert folder.last.read_bytes() == saved
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")], "no half file stays"
    assert len(quiet(with_values(values, epochs=2), resume=True).history) == 2


def test_a_run_is_neither_overwritten_nor_continued_with_another_config(values: dict[str, Any]) -> None:
    quiet(with_values(values, epochs=1))
    with pytest.raises(FileExistsError, match=r"run: .* holds a run; pass --resume to go on"):
        quiet(with_values(values, epochs=1))
    changed = with_values(values, epochs=2, optimizer={"learning_rate": 0.5})
    with pytest.raises(
        ValueError, match=r"optimizer\.learning_rate: the run was made with 0\.01, .* got 0\.5"
    ):
        quiet(changed, resume=True)


def test_stating_a_default_is_no_change(values: dict[str, Any]) -> None:
    quiet(with_values(values, epochs=1))
    stated = {
        "model": {**values["model"], "attention_heads": 2, "architecture": "crossan", "top_k": None},
        "optimizer": {**values["optimizer"], "average": None},
        "evaluation": {"k": [5, 20]},
        "modalities": ["text", "image"],
    }
    assert len(quiet(with_values({**values, **stated}, epochs=2), resume=True).history) == 2
    changed = {"model": {**values["model"], "attention_heads": 4}}
    with pytest.raises(ValueError, match=r"model\.attention_heads: the run was made with 2, .* got 4"):
        quiet(with_values({**values, **changed}, epochs=3), resume=True)
    with pytest.raises(ValueError, match=r"modalities: the run was made with \['text', 'image'\]"):
        quiet(with_values({**values, "modalities": ["image", "text"]}, epochs=3), resume=True)


def test_resuming_nothing_starts(values: dict[str, Any]) -> None:
    assert len(quiet(with_values(values, epochs=1), resume=True).history) == 1


def test_a_checkpoint_of_before_a_field_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(with_values(values, epochs=1).run)
    quiet(with_values(values, epochs=1))
    tensors, metadata = load_tensors(folder.last, "checkpoint")
    known = json.loads(metadata["config"])
    del known["targets"], known["negatives"], metadata[KEY]
    write_whole(folder.last, save_tensors(tensors, metadata | {"config": json.dumps(known)}))
    assert len(quiet(with_values(values, epochs=2), resume=True).history) == 2
    other = {"config": json.dumps(known | {"window": 4})}
    write_whole(folder.last, save_tensors(tensors, metadata | other))
    with pytest.raises(ValueError, match="holds another model than the config describes"):
        quiet(with_values(values, epochs=3), resume=True)


def test_a_run_of_before_ids_had_a_decay_goes_on_as_it_was(values: dict[str, Any]) -> None:
    values["model"] |= {"id_embedding": True}
    values["optimizer"] |= {"id_weight_decay": None}
    folder = quiet(with_values(values, epochs=1)).folder
    lines = folder.config.read_text().splitlines(keepends=True)[1:]  # without its digest, as an old one's
    folder.config.write_text("".join(line for line in lines if "id_weight_decay" not in line))
    with pytest.warns(UserWarning, match="before digests were kept"):
        assert folder.read_config().optimizer.id_weight_decay is None
    del values["optimizer"]["id_weight_decay"]
    with pytest.raises(ValueError, match=r"optimizer\.id_weight_decay: the run was made with None.*got 5\.0"):
        quiet(with_values(values, epochs=2), resume=True)
    values["optimizer"] |= {"id_weight_decay": None}
    assert len(quiet(with_values(values, epochs=2), resume=True).history) == 2
    # Without ids there was nothing to decay; a baseline of such a run takes the default.
    values["model"] |= {"id_embedding": False}
    del values["optimizer"]["id_weight_decay"]
    plain = quiet(with_values(values, epochs=1, run=values["run"] + "-plain")).folder
    lines = plain.config.read_text().splitlines(keepends=True)[1:]
    plain.config.write_text("".join(line for line in lines if "id_weight_decay" not in line))
    with pytest.warns(UserWarning, match="before digests were kept"):
        assert plain.read_config().optimizer.id_weight_decay == 5


def test_a_damaged_checkpoint_is_named(values: dict[str, Any]) -> None:
    config = with_values(values, epochs=1)
    trainer = quiet(config)
    last = trainer.folder.last
    last.write_bytes(last.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"checkpoint: .*last\.safetensors cannot be read"):
        quiet(with_values(values, epochs=2), resume=True)
    last.write_bytes((trainer.folder.best / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint: expected version 1 in .*, got None"):
        quiet(with_values(values, epochs=2), resume=True)
    last.unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint: no file"):
        trainer.folder.load_model("last")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: expected config\.yaml in .*, found none"):
        RunFolder(tmp_path).read_config()
    with pytest.raises(FileNotFoundError, match=r"run: expected a folder best/ in .*, found none"):
        RunFolder(tmp_path).load_model()


def test_wrong_data_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent"):
        Trainer(with_values(values, cache=str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError, match=r"users.*absent"):
        Trainer(with_values(values, users=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="device: 'tpu9' cannot be used"):
        Trainer(with_values(values, device="tpu9"))
    users = tmp_path / "users.tsv"
    users.write_text(
        "ann\t"
        + " ".join(f"item{i}" for i in range(1, 8))
        + " unheard_of\nben\titem1 item2 item3 item9 item8\n"
    )
    with pytest.raises(ValueError, match=r"1 interactions with 1 items that the items file lacks"):
        Trainer(with_values(values, users=str(users), strict=True))
    with pytest.warns(UserWarning, match="'unheard_of'; dropped"):
        Trainer(with_values(values, users=str(users), evaluation={"candidates": "all"}))
