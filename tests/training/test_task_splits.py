"""What a config says of its split, from the file to the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast.cache.writer import write_cache
from crossan_fast.training import TrainConfig, load_config, open_task, train

ITEMS = 12
Make = Callable[..., TrainConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(**settings)`: a config over a log of 20 users with 12 events, a day apart."""
    states = torch.randn(ITEMS + 1, 2, 8, generator=torch.Generator().manual_seed(0))
    states[0] = 0
    write_cache(tmp_path / "cache", {"text": states}, item_names=[f"b{i}" for i in range(ITEMS)])
    rows = [
        f"u{u},b{(u + day) % ITEMS},2020-03-{day + 1:02},{day % 5 + 1},{max(0, day - 9)}\n"
        for u in range(20)
        for day in range(12)
    ]
    (tmp_path / "log.csv").write_text("who,item,timestamp,rating,x_label\n" + "".join(rows))
    base = {
        "cache": str(tmp_path / "cache"),
        "users": str(tmp_path / "log.csv"),
        "run": str(tmp_path / "run"),
        "columns": {"user": "who"},
        "model": {"embedding_dim": 8, "bottleneck": 2, "window": 3, "blocks": 1, "dropout": 0.0},
        "backend": "eager",
        "epochs": 1,
    }
    return lambda **settings: TrainConfig.from_dict({**base, **settings})


@pytest.mark.parametrize(
    ("settings", "rows", "targets", "said"),
    [
        ({}, 20, 20, "leave-one-out"),
        ({"split": {"stride": 3}}, 60, 20, "leave-one-out"),
        ({"split": {"stride": "prefixes"}}, 180, 20, "leave-one-out"),
        ({"split": {"by": "time", "validation": "2020-03-11", "test": "2020-03-12"}}, 20, 20, "by time, at"),
        ({"split": {"by": "ratio", "validation": 0.25, "test": 0.25}}, 20, 60, "by ratio, 0.25 and 0.25"),
        ({"split": {"by": "given"}}, 20, 20, "as given"),
        ({"min_rating": 2}, 20, 20, "low ratings"),
    ],
)
def test_splits(make: Make, settings: dict[str, Any], rows: int, targets: int, said: str) -> None:
    task = open_task(make(**settings))
    assert task.split.train.shape == (rows, 4)
    assert task.split.test_target.numel() == targets
    described = task.describe()
    assert said in described and "user 'who'" in described and "left out: " in described


@pytest.mark.parametrize(("window", "min_items"), [(1, 5), (3, 8)])
def test_users_may_need_more_items_than_count(make: Make, window: int, min_items: int) -> None:
    """By default the last window + 3 items of a user count, fewer than the user may have to have."""
    model = {"embedding_dim": 8, "bottleneck": 2, "window": window, "blocks": 1}
    split = open_task(make(model=model, min_items=min_items)).split
    last = [(u + day) % ITEMS + 1 for u in range(20) for day in (10, 11)]
    assert split.validation_target.tolist() == last[::2] and split.test_target.tolist() == last[1::2]
    assert split.train.tolist() == [
        [(u + day) % ITEMS + 1 for day in range(9 - window, 10)] for u in range(20)
    ]
    with pytest.raises(ValueError, match=r"none of 20 users has min_items = 13 known items"):
        open_task(make(model=model, min_items=13))
    with pytest.raises(ValueError, match=r"max_items: expected at least 3 \(two targets and a history\)"):
        make(max_items=2)


def test_a_column_of_labels_orders_a_given_split_alone(make: Make, tmp_path: Path) -> None:
    """Labels against time: the first event of each user tests where the split is given, else the last."""
    log = (tmp_path / "log.csv").read_text().splitlines()
    labels = [2, 1, *[0] * 10] * 20
    rows = [f"{line.rpartition(',')[0]},{label}" for line, label in zip(log[1:], labels, strict=True)]
    (tmp_path / "log.csv").write_text("\n".join([log[0], *rows]) + "\n")
    in_time, given = (open_task(make(split={"by": by})) for by in ("leave_one_out", "given"))
    first = [u % ITEMS + 1 for u in range(20)]
    assert given.split.test_target.tolist() == first and "label 'x_label'" in given.describe()
    assert in_time.split.test_target.tolist() == [(row + 10) % ITEMS + 1 for row in first]
    assert "label 'x_label'" not in in_time.describe()


def test_given_files_and_users_apart(make: Make, tmp_path: Path) -> None:
    lines = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    for part, label in (("train", 0), ("valid", 1), ("test", 2)):
        chosen = [line for line in lines[1:] if line.endswith(f",{label}\n")]
        (tmp_path / f"x.{part}.csv").write_text("".join([lines[0], *chosen]))
    whole = open_task(make(split={"by": "given"})).split
    siblings = open_task(make(users=str(tmp_path / "x.train.csv"), split={"by": "given"})).split
    files = {"by": "given", "validation": str(tmp_path / "x.valid.csv"), "test": "${data}/x.test.csv"}
    named = open_task(make(users=str(tmp_path / "x.train.csv"), split=files, data=str(tmp_path))).split
    for split in (siblings, named):
        assert torch.equal(split.train, whole.train) and torch.equal(split.test_target, whole.test_target)
    (tmp_path / "others.csv").write_text(
        "who,item,timestamp\n" + "".join(f"v,b{k},{k}\nu1,b{k},{k}\n" for k in range(6))
    )
    task = open_task(make(evaluation={"users": str(tmp_path / "others.csv")}))
    assert task.split.test_target.tolist() == [6] and task.split.validation_input.tolist() == [[2, 3, 4]]
    assert int(task.split.train_counts.sum()) == 20 * 12, "those trained on hold nothing back"
    assert "1 users of the evaluation file who are trained on" in task.describe()


def test_a_run_says_how_its_targets_were_held_out(make: Make, tmp_path: Path) -> None:
    config = make(split={"by": "ratio", "validation": 0.25, "test": 0.25, "stride": 2}, evaluation={"k": [5]})
    config = replace(config, evaluation=replace(config.evaluation, k=(5,)))
    results = train(config, progress=False)
    assert "60 test targets (by ratio, 0.25 and 0.25 of each user)" in results["test"]["protocol"]
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept == replace(config, precision="fp32"), "the split is kept with the run"


def test_bad_settings_are_named(make: Make, tmp_path: Path) -> None:
    for split, message in (
        ({"by": "tme"}, r"split.by: expected one of .*; did you mean 'time'"),
        ({"by": "time", "test": 3}, r"split.validation, split.test: expected two moments"),
        ({"by": "ratio", "test": "late"}, r"split.test: expected a share, with split.by ratio, got 'late'"),
        ({"validation": 3}, r"expected neither, with split.by leave_one_out"),
        ({"stride": "prefix"}, r"split.stride: expected at least 1, prefixes or null, got 'prefix'"),
        ({"strid": 3}, r"unknown config key 'split.strid'; did you mean 'split.stride'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(split=split)
    with pytest.raises(ValueError, match=r"split.by: expected leave_one_out, with evaluation.users"):
        make(split={"by": "given"}, evaluation={"users": "x"})
    dates = tmp_path / "config.yaml"
    dates.write_text(
        "cache: c\nusers: u\nrun: r\nsplit: {by: time, validation: 2020-03-11, test: 2020-03-12T10:00:00}\n"
    )
    assert load_config(dates).split.validation == "2020-03-11"
