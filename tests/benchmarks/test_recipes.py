"""The recipes: their configs stand, a run is recorded as it is, reports are drawn from records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.recipes import basis, scientific, tabulate
from crossan_fast.cache import HiddenStateCache
from crossan_fast.cache.writer import write_cache
from crossan_fast.data import leave_one_out, read_interactions, read_items
from crossan_fast.training import RunFolder, TrainConfig, load_config, train


@pytest.mark.parametrize("variant", scientific.VARIANTS)
def test_the_config_takes_every_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSAN_FAST_DATA", "/data")
    config = load_config(scientific.CONFIG, scientific.VARIANTS[variant])
    assert config.model["loss"] == variant
    assert config.evaluation.filter_history == "all"
    assert config.path("users") == Path("/data/scientific/users.tsv")


def test_the_data_are_the_papers(data_folder: Path) -> None:
    items = read_items(data_folder / "scientific" / "items.tsv")
    users = data_folder / "scientific" / "users.tsv"
    interactions = read_interactions(users, items.names, max_items=13, catalogue="used")
    assert str(interactions) == "12,076 users, 20,314 items, 81,711 interactions"
    split = leave_one_out(interactions, 10)
    repeats = (split.history_test == split.test_target[:, None]).any(dim=1)
    assert round(100 * float(repeats.double().mean()), 2) == 5.14


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """Two variants with one and two seeds, recorded."""
    states = torch.randn(21, 2, 8)
    states[0] = 0
    names = [f"i{i}" for i in range(20)]
    write_cache(tmp_path / "cache", {"mean": states}, item_names=names)
    rows = [" ".join(names[(3 * user + j) % 20] for j in range(6)) for user in range(20)]
    (tmp_path / "users.tsv").write_text("".join(f"u{u}\t{row}\n" for u, row in enumerate(rows)))
    monkeypatch.setattr(scientific, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(scientific, "EPOCHS", tmp_path / "epochs.csv")
    folders = []
    for variant, seed in (("in_batch", 0), ("in_batch", 1), ("full", 0)):
        config = {
            "cache": str(tmp_path / "cache"),
            "users": str(tmp_path / "users.tsv"),
            "run": str(tmp_path / f"{variant}-{seed}"),
            "model": {"loss": variant, "embedding_dim": 8, "bottleneck": 4, "window": 4},
            "seed": seed,
            "epochs": 6,
            "patience": None,
            "backend": "eager",
            "evaluation": {"k": [5, 10, 15]},
        }
        train(TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config))), progress=False)
        folders.append(RunFolder(config["run"]))
        scientific.record(variant, folders[-1])
    return folders


def test_the_report_is_drawn_from_the_records(
    runs: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The report's columns have HR@20, which needs more than 20 items.
    text = (tmp_path / "runs.csv").read_text().replace("hr@15", "hr@20")
    (tmp_path / "runs.csv").write_text(text)
    rows = tabulate.read(tmp_path / "runs.csv")
    values = [float(row["test_hr@10"]) for row in rows if row["variant"] == "in_batch"]
    written = tabulate.table(
        tabulate.by_variant(rows), tabulate.by_variant(tabulate.read(tmp_path / "epochs.csv"))
    )
    assert f"**{100 * sum(values) / 2:.2f}**" in written
    assert "| in_batch | mean of 2 |" in written
    assert "after 5 epochs" in written
    assert "filter_history=all_except_target" in written
    picture = tmp_path / "curve.png"
    tabulate.draw(tabulate.by_variant(tabulate.read(tmp_path / "epochs.csv")), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_recorded_again_takes_the_place_of_the_old_row(runs: list[RunFolder], tmp_path: Path) -> None:
    scientific.record("full", runs[-1])
    rows = tabulate.read(tmp_path / "runs.csv")
    assert len(rows) == 4
    grouped = tabulate.by_variant(rows)
    assert [len(grouped[variant]) for variant in ("in_batch", "full")] == [2, 1]


def test_equal_epochs_and_equal_time_by_hand() -> None:
    def rows(variant: str, seconds: float, values: list[float]) -> list[tabulate.Row]:
        return [
            {
                "variant": variant,
                "seed": "0",
                "epoch": str(epoch),
                "train_seconds": str(seconds * epoch),
                "validation_ndcg@10": str(value),
            }
            for epoch, value in enumerate(values, start=1)
        ]

    fast, slow = (
        rows("in_batch", 1, [0.01, 0.02, 0.03, 0.02, 0.01, 0.04]),
        rows("full", 3, [0.05, 0.04, 0.06]),
    )
    lines = tabulate.compare({"in_batch": fast, "full": slow})
    assert lines[2] == "| after 3 epochs | 3.00 | 6.00 |"
    assert lines[3:] == [
        "| after 2 s of training | 1.00 | not yet evaluated |",
        "| after 3 s of training | 3.00 | 5.00 |",
        "| after 4 s of training | 3.00 | 5.00 |",
        "| after 6 s of training | 4.00 | 5.00 |",
        "| after 9 s of training | 4.00 | 6.00 |",
    ]
    slow[1]["train_seconds"], slow[2]["train_seconds"] = "600", "603"  # a pause is no epoch's time
    assert tabulate.compare({"in_batch": fast, "full": slow}) == lines


def test_each_width_is_trained_once_on_its_own_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(26, 2, 8) * torch.tensor([4.0, 3, 2, 1, 0.5, 0.1, 0.1, 0.1])
    states[0] = 0
    names = [f"i{i}" for i in range(25)]
    write_cache(tmp_path / "whole", {"mean": states, "cls": states.flip(2)}, item_names=names)
    rows = [" ".join(names[(3 * user + j) % 25] for j in range(6)) for user in range(20)]
    (tmp_path / "users.tsv").write_text("".join(f"u{u}\t{row}\n" for u, row in enumerate(rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(basis, "BASES", tmp_path / "basis.csv")
    given = ["cache=whole", "users=users.tsv", "epochs=2", "patience=null", "batch_size=10", "backend=eager"]
    given += ["model.embedding_dim=8", "model.bottleneck=4", "model.window=4"]
    for _ in range(2):  # the second time there is nothing to do
        assert basis.run("scientific4k", [8, 3], [0, 1], given) == 0
        found = tabulate.read(tmp_path / "basis.csv")
        assert [(row["width"], row["seed"]) for row in found] == [
            ("8", "0"),
            ("3", "0"),
            ("8", "1"),
            ("3", "1"),
        ]
    assert found[0]["energy"] == "mean=1.0000 cls=1.0000"
    held = {m: HiddenStateCache.open("whole-3").sources[m]["energy"] for m in ("mean", "cls")}
    assert found[1]["energy"] == " ".join(f"{m}={sum(e) / 2:.4f}" for m, e in held.items())
    assert "cpu" not in found[0]["device"] and found[0]["filter_history"] == "none"
    written = tabulate.basis_table(found)
    mean = 50 * sum(float(row["test_hr@10"]) for row in found[1::2])
    assert "20 users ranked among all 25 items, filter_history=none" in written
    assert f"| 3 | {found[1]['energy']} | 0.0 |" in written and f"| 2 | {mean:.2f} ± " in written


def test_the_fewest_dimensions_within_noise() -> None:
    def rows(hits: list[float]) -> list[tabulate.Row]:
        return [{"test_hr@10": str(hit), "test_ndcg@10": str(hit / 2)} for hit in hits]

    full = rows([0.12, 0.121, 0.122])
    groups = {384: full, 128: rows([0.119, 0.12, 0.121]), 64: rows([0.111, 0.112, 0.113])}
    assert tabulate.fewest_within_noise(groups) == 128
    assert tabulate.fewest_within_noise({384: full, 64: groups[64]}) == 384
    assert tabulate.fewest_within_noise({**groups, 32: full[:1]}) is None


@pytest.mark.parametrize("data", basis.CONFIGS)
def test_the_basis_recipes_configs_stand(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSAN_FAST_DATA", "/data")
    config = load_config(basis.CONFIGS[data])
    assert config.path("users") == Path(f"/data/{data}/users.tsv") and config.model["loss"] == "in_batch"
    assert config.path("cache").name == data
