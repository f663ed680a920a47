"""Two processes train, evaluate and resume as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from crossan_fast.training import Batches, RunFolder, TrainConfig, Trainer, join_processes, train
from crossan_fast.training.checkpoint import load_checkpoint

WORLD = 2
# 48 users: steps of 47 and 1, so that in each epoch's last step the second process has no row.
BATCH = 47


def settings(values: dict[str, Any], folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    evaluation = {"batch_size": 7, "k": [1, 5]}
    model = {**values["model"], "dropout": 0.0, **changes.pop("model", {})}
    return {
        **values,
        "batch_size": BATCH,
        "evaluation": evaluation,
        "epochs": 2,
        "model": model,
        "run": str(folder / run),
        **changes,
    }


def worker(rank: int, port: int, runs: list[tuple[dict[str, Any], bool]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_processes("cpu") as processes:
        for number, (values, resume) in enumerate(runs):
            trainer = Trainer(TrainConfig.from_dict(values), processes=processes)
            results = trainer.fit(resume=resume, progress=True)
            seen = {"results": results, "epochs": len(trainer.history)}
            Path(folder, f"{number}.{rank}.json").write_text(json.dumps(seen))


def two_processes(runs: list[tuple[dict[str, Any], bool]], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, runs, str(folder)), nprocs=WORLD)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The weights after the last epoch, the losses and the metrics of two runs."""
    states, histories = [], []
    for values in (first, second):
        trainer = Trainer(TrainConfig.from_dict(values))
        histories.append(load_checkpoint(trainer.folder.last, trainer.model, trainer.optimizer)["history"])
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=2e-5, msg=name)
    for one, two in zip(*histories, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["validation"] == pytest.approx(one["validation"], rel=1e-9)


def test_two_processes_train_as_one(values: dict[str, Any], tmp_path: Path) -> None:
    """Both losses, IISAN's fusion, and going on with another number of processes, either way."""
    in_batch = settings(values, tmp_path, "in_batch")
    full = settings(values, tmp_path, "full", model={"loss": "full"})
    iisan = settings(values, tmp_path, "iisan", model={"architecture": "iisan"})
    last = settings(values, tmp_path, "last", model={"targets": "last"})
    sampled = settings(values, tmp_path, "sampled", model={"loss": "sampled", "negatives": 20})
    fewer, more = (settings(values, tmp_path, run, epochs=1) for run in ("fewer", "more"))
    masked = settings(values, tmp_path, "masked", model={"dropout": 0.3})
    short = settings(values, tmp_path, "short", model={"dropout": 0.3}, epochs=1)
    train(TrainConfig.from_dict(more), progress=False)
    trained = settings(values, tmp_path, "trained")
    tested = train(TrainConfig.from_dict(trained), progress=False)
    runs = [(in_batch, False), (full, False), (iisan, False), (fewer, False), ({**more, "epochs": 2}, True)]
    runs += [(masked, False), (short, False), ({**short, "epochs": 2}, True), (trained, True)]
    runs += [(last, False), (sampled, False)]
    two_processes(runs, tmp_path)

    for number, (run, _) in enumerate(runs):
        seen = [json.loads((tmp_path / f"{number}.{rank}.json").read_text()) for rank in range(WORLD)]
        for one in seen:
            del one["results"]["train_seconds"]
        assert seen[0] == seen[1], "every process has the same metrics and stops at the same epoch"
        held = sorted(path.name for path in Path(run["run"]).iterdir())
        files = ["best", "config.yaml", "last.safetensors", "log.jsonl", "population.json", "results.json"]
        assert held == files

    # One process's weights, ranked by two: equal, not near, since shares are cut where one process cuts.
    again = json.loads(RunFolder(trained["run"]).results.read_text())
    assert (again["validation"], again["test"]) == (tested["validation"], tested["test"])
    for run in (in_batch, full, iisan, last):
        alone = {**run, "run": run["run"] + "-alone"}
        results = train(TrainConfig.from_dict(alone), progress=False)
        assert_same(alone, run)
        written = json.loads(RunFolder(run["run"]).results.read_text())
        assert written["test"] == results["test"]
    train(TrainConfig.from_dict({**fewer, "epochs": 2}), resume=True, progress=False)
    for run in (fewer, more):
        assert_same(in_batch, {**run, "epochs": 2})
    assert_same(masked, {**short, "epochs": 2})


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_make_up_the_batch(size: int) -> None:
    rows = torch.arange(1, 35).reshape(17, 2)
    whole = Batches(rows, 4, seed=3)
    parts = [Batches(rows, 4, seed=3, rank=rank, size=size) for rank in range(size)]
    for batch, *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert len({share.shape for share in shares}) == 1
        joined = torch.cat(shares)
        assert sorted(joined[joined[:, 0] != 0].tolist()) == sorted(batch[batch[:, 0] != 0].tolist())


@pytest.mark.long
def test_torchrun(values: dict[str, Any], tmp_path: Path) -> None:
    """The command as README says it; one process speaks."""
    values |= {"epochs": 1, "device": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += ["-m", "crossan_fast", "train", str(tmp_path / "config.yaml"), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1: loss") == 1
    assert done.stdout.count("HR@k %") == 1
    assert json.loads(RunFolder(values["run"]).results.read_text())["epochs"] == 1


def test_a_device_with_an_index_serves_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    expected = pytest.raises(ValueError, match=r"device: expected auto, cuda or cpu .*, got 'cuda:1'")
    with expected, join_processes("cuda:1"):
        pass


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_processes() as processes:
        assert (processes.rank, processes.size, processes.group) == (0, 1, None)
        assert torch.equal(processes.sum(torch.ones(2)), torch.ones(2))
