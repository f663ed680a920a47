"""The recipes: their configs stand, a run is recorded as it is, reports are drawn from records."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.recipes import ablations, basis, caches, encoders, records, run, tables, tabulate
from crossan_fast.cache import HiddenStateCache
from crossan_fast.cache.writer import write_cache
from crossan_fast.data import leave_one_out, read_interactions, read_items
from crossan_fast.training import load_config

SMALL = ["model.embedding_dim=8", "model.bottleneck=4", "model.window=4", "backend=eager", "patience=null"]


@pytest.mark.parametrize("name", caches.RECIPES)
def test_the_configs_take_every_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSAN_FAST_DATA", "/data")
    recipe = caches.RECIPES[name]
    for variant, settings in ((run.PLAIN, ()), *recipe.variants):
        config = load_config(recipe.config, settings)
        assert config.model["loss"] == ("full" if variant == "full" else "in_batch")
        assert config.evaluation.filter_history == ("all" if name == "scientific" else "none")
        assert config.path("users") == Path(f"/data/{name}/users.tsv")
        assert config.path("cache").name == name and config.path("items").parent.name == name


def test_the_data_are_the_papers(data_folder: Path) -> None:
    items = read_items(data_folder / "scientific" / "items.tsv")
    users = data_folder / "scientific" / "users.tsv"
    interactions = read_interactions(users, items.names, max_items=13, catalogue="used")
    assert str(interactions) == "12,076 users, 20,314 items, 81,711 interactions"
    split = leave_one_out(interactions, 10)
    repeats = (split.history_test == split.test_target[:, None]).any(dim=1)
    assert round(100 * float(repeats.double().mean()), 2) == 5.14


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in: 25 items with the states of three encoders, 20 users; rows go into it as well."""
    states = torch.randn(26, 1, 8) * torch.tensor([4.0, 3, 2, 1, 0.5, 0.1, 0.1, 0.1]) + 3
    states[0] = 0
    names = [f"i{i}" for i in range(25)]
    held = {"minilm": states, "clip_text": states.flip(2), "clip_image": states.roll(1, 2)}
    write_cache(tmp_path / "whole", held, item_names=names)
    rows = [" ".join(names[(3 * user + j) % 25] for j in range(6)) for user in range(20)]
    (tmp_path / "users.tsv").write_text("".join(f"u{u}\t{row}\n" for u, row in enumerate(rows)))
    (tmp_path / "items.tsv").write_text("".join(f"{name}\tthing\n" for name in names))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(run, "EPOCHS", tmp_path / "epochs.csv")
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(ablations, "RETENTION", tmp_path / "retention.csv")
    monkeypatch.setattr(encoders, "ROWS", tmp_path / "encoders.csv")
    return tmp_path


GIVEN = ["cache=whole", "users=users.tsv", "items=items.tsv", "epochs=2", "batch_size=10", *SMALL]


def test_a_recipe_is_trained_once_with_each_seed_and_setting(shop: Path) -> None:
    recipe = replace(caches.RECIPES["scientific2k"], basis=4)
    said: list[str] = []
    for settings in (GIVEN, GIVEN, [*GIVEN, "model.fusion=concat"]):
        assert run.run(recipe, run.PLAIN, settings, [0, 1]) == 0
    rows = records.read(shop / "runs.csv")
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    assert {row["cache"] for row in rows} == {"whole-centred-4"}
    assert rows[-1]["setting"].endswith("model.fusion=concat") and rows[-1]["filter_history"] == "none"
    jobs = run.jobs(recipe, run.PLAIN, [*GIVEN, "model.fusion=concat"], [1, 2])
    records.carry_out(jobs, shop / "runs.csv", said.append)
    assert len(said) == 1 and said[0].startswith("1 of 2 runs to go, about 0 min: data=scientific2k")
    table = tables.ablations_table(records.read(shop / "runs.csv"))
    assert "20 users ranked among all 25 items, filter_history=none" in table
    assert table.count("| `cache=whole") == 2 and "| 0 1 2 |" in table


def test_ties_in_random_order_stand_beside_the_test(shop: Path) -> None:
    """25 items with the same states tie all alike: one of 25 places each, and none with ties against it."""
    alike = (torch.arange(26) > 0).float()[:, None, None].expand(26, 1, 8).contiguous()
    states = dict.fromkeys(encoders.ENCODERS, alike)
    write_cache(shop / "alike", states, item_names=[f"i{i}" for i in range(25)])
    recipe = replace(caches.RECIPES["scientific2k"], centred=False, basis=None)
    assert run.run(recipe, run.PLAIN, [*GIVEN, "cache=alike"], [0]) == 0
    (row,) = records.read(shop / "runs.csv")
    assert float(row["test_hr@10"]) == 0 and float(row["test_ties_hr@10"]) == pytest.approx(10 / 25)
    gain = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 25
    assert float(row["test_ties_ndcg@10"]) == pytest.approx(gain, abs=1e-6)
    table = tables.ablations_table([row])
    assert "| ties in random order | NDCG@10 |" in table
    assert f"| 0.00 | 0.00 | 40.00 | {100 * gain:.2f} |" in table
    older = {**row, "seed": "1", "test_ties_hr@10": "", "test_ties_ndcg@10": ""}
    assert "| 0.00 ± 0.00 | 0.00 ± 0.00 |  |  |" in tables.ablations_table([row, older])
    untold = tables.ablations_table([older | {"data": "scientific4k"}])
    assert "random order" not in untold and "| 12.69 | 6.59 |\n" in untold
    told = tables.ablations_table([row | {"data": "scientific4k"}]).splitlines()
    assert {line.count("|") for line in told if line.startswith("| ")} == {12}


def test_a_run_that_was_cut_off_goes_on(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = run.jobs(replace(caches.RECIPES["scientific2k"], basis=None), run.PLAIN, GIVEN, [3])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(records, "summary", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        records.carry_out(jobs, shop / "runs.csv")
    records.carry_out(jobs, shop / "runs.csv")  # the folder is no reason to refuse
    assert len(records.read(shop / "runs.csv")) == 1


def test_settings_with_a_name_keep_their_curve(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shop / "scientific2k.yaml"
    recipe = replace(caches.RECIPES["scientific2k"], centred=False, basis=None)
    values = yaml.safe_load(recipe.config.read_text())
    given = {"cache": "whole", "users": "users.tsv", "items": "items.tsv", "epochs": 4, "batch_size": 10}
    model = {"embedding_dim": 8, "bottleneck": 4, "window": 4}
    config.write_text(yaml.safe_dump({**values, **given, "model": model, "backend": "eager"}))
    monkeypatch.setattr(caches.Recipe, "config", config)
    assert run.run(recipe, run.PLAIN, [], [0]) == 0
    rows = records.read(shop / "epochs.csv")
    assert [(row["data"], row["setting"], row["epoch"]) for row in rows] == [
        ("scientific2k", "recipe", "2"),
        ("scientific2k", "recipe", "4"),
    ]
    assert records.read(shop / "runs.csv")[0]["setting"] == "recipe"


def test_ablations_run_by_themselves(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["sampled, uniform", "modality dropout by history", "prefixes", "one level", "learning rate 3e-3"]
    arguments = ["ablations", "scientific2k", "--seeds", "0", "--only", *names]
    monkeypatch.setattr(sys, "argv", [*arguments, "--list"])
    assert ablations.main() == 0
    output = capsys.readouterr()
    listed = [line.partition(":")[0] for line in output.out.splitlines()]
    assert listed == names[:3], "there is one level, and the recipe has that learning rate"
    assert output.err.endswith("left out, as scientific2k is so already: one level, learning rate 3e-3\n")
    given = [value for value in GIVEN if value != "patience=null"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", *given])
    assert ablations.main() == 0
    said = capsys.readouterr().out
    assert (
        "4 of 4 runs to go, time known after the first" in said and "1 of 4 runs to go, about 0 min" in said
    )
    assert ablations.main() == 0
    assert "runs to go" not in capsys.readouterr().out
    rows = records.read(shop / "runs.csv")
    assert len(rows) == 4 and sum("model.loss=sampled" in row["setting"] for row in rows) == 1
    retention = records.read(shop / "retention.csv")
    assert ["history" in row["setting"] for row in retention] == [False] * 3 + [True] * 3
    assert [row["without"] for row in retention] == [*encoders.ENCODERS] * 2
    for row, trained in zip(retention[::3], (rows[0], rows[2]), strict=True):
        assert row["whole_hr@10"] == trained["test_hr@10"]
    first = retention[0]
    assert float(first["retention_hr@10"]) == pytest.approx(
        float(first["test_hr@10"]) / float(first["whole_hr@10"]), abs=1e-4
    )
    written = tables.ablations_table(rows, retention)
    assert f"| whole-centred | `{first['setting']}` | 0 | {tables.percent(first['whole_hr@10'])} |" in written


def test_what_a_missing_modality_and_fewer_levels_leave(shop: Path) -> None:
    states = torch.arange(26.0)[:, None, None] + torch.arange(7.0)[:, None] * torch.ones(8)
    states[0] = 0
    write_cache(shop / "deep", {"mean": states, "cls": -states}, dtype="fp32")
    caches.write_levels(shop / "deep", shop / "three", 3)
    held = HiddenStateCache.open(shop / "three")
    ids = torch.arange(26)
    assert torch.equal(held.gather(ids)["cls"], -states[:, [0, 3, 6]])
    left = ablations.without(held, "cls")
    assert left.present[1:].tolist() == [[True, False]] * 25 and not left.present[0].any()
    assert torch.equal(left.gather(ids)["mean"], held.gather(ids)["mean"])
    assert replace(caches.RECIPES["scientific4k"], levels=3).suffix == "-centred-128-levels3"
    assert [caches.RECIPES[name].cached_levels for name in ("scientific4k", "scientific2k")] == [7, 1]


def test_the_study_of_encoders_has_every_subset(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "STATES", {"centred": replace(encoders.RECIPE, basis=4)})
    given = [*GIVEN, "epochs=1"]
    arguments = ["encoders", "--seeds", "0", "1", "--models", "momef", "momef, cross", "--set", *given]
    monkeypatch.setattr(sys, "argv", arguments)
    assert encoders.main() == 0 and encoders.main() == 0
    rows = records.read(shop / "encoders.csv")
    assert len(rows) == 2 * (7 + 4)
    assert len({(row["encoders"], row["model"]) for row in rows}) == 11
    written = tables.encoders_table(rows)
    every = [r for r in rows if r["encoders"] == "minilm + clip_text + clip_image" and r["model"] == "momef"]
    assert f"{tables.spread([float(row['test_hr@10']) for row in every])} (2)" in written
    tables.draw_encoders(rows, shop / "encoders.png")
    assert (shop / "encoders.png").read_bytes().startswith(b"\x89PNG")


def test_gains_by_hand() -> None:
    def row(model: str, subset: str, seed: int, value: float) -> records.Row:
        return {
            "device": "one",
            "model": model,
            "encoders": subset,
            "seed": str(seed),
            "test_hr@10": str(value),
            "validation_hr@10": str(value),
        }

    single = [row("momef", name, 0, value) for name, value in zip("abc", (0.1, 0.2, 0.3), strict=True)]
    double = [row("momef", f"{a} + {b}", 0, 0.3) for a, b in ("ab", "ac", "bc")]
    rows = [*single, *double, row("momef", "a + b + c", 0, 0.35), row("momef, cross", "a + b + c", 0, 0.25)]
    rows.append(row("momef", "a", 1, 0.9))  # a seed without all subsets says nothing of their mean
    groups = tables.grouped(rows, "model", "encoders")
    two, three, best = tables.gains(groups, "momef", "hr@10")
    assert (two, three) == ([pytest.approx(0.1)], [pytest.approx(0.15)])
    # a is best on validation, over its two seeds, and of seed 0 alone there is a run with all three.
    assert best == [pytest.approx(0.25)]
    two, three, best = tables.gains(groups, "momef, cross", "hr@10")
    assert (two, three) == ([], [pytest.approx(0.05)])
    assert tables.paired(rows[:1], rows[-1:], "hr@10") == []


def test_differences_are_taken_on_one_machine_where_both_were_there() -> None:
    def row(device: str, seed: int, value: float) -> records.Row:
        return {"device": device, "seed": str(seed), "test_hr@10": str(value)}

    plain = [row("a", 0, 0.1), row("b", 0, 0.2), row("a", 0, 0.12), row("a", 1, 0.3)]
    ours = [row("a", 0, 0.15), row("b", 1, 0.3), row("b", 2, 0.9)]
    # The latest of machine a; of seed 1 b has none, and of seed 2 nobody.
    assert tables.paired(ours, plain, "hr@10") == [pytest.approx(0.03), pytest.approx(0)]
    assert tables.paired([row("b", 0, 0.15)], plain, "hr@10") == [pytest.approx(-0.05)]
    assert tables.paired([row("c", 0, 0.15)], plain, "hr@10") == [pytest.approx(0.03)]


def test_the_report_is_drawn_from_the_records(tmp_path: Path) -> None:
    rows = records.read(run.RUNS)
    losses, epochs = tabulate.by_loss(rows), tabulate.by_loss(records.read(run.EPOCHS))
    values = [float(row["test_hr@10"]) for row in losses["in_batch"]]
    written = tabulate.table(losses, epochs)
    assert f"**{100 * sum(values) / len(values):.2f}**" in written
    assert f"| in_batch | mean of {len(values)} |" in written
    assert "after 5 epochs" in written and "filter_history=all" in written
    tabulate.draw(epochs, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_equal_epochs_and_equal_time_by_hand() -> None:
    def rows(variant: str, seconds: float, values: list[float]) -> list[records.Row]:
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
    (tmp_path / "items.tsv").write_text("".join(f"{name}\tthing\n" for name in names))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(basis, "BASES", tmp_path / "basis.csv")
    given = GIVEN
    for _ in range(2):  # the second time there is nothing to do
        assert basis.run("scientific4k", [8, 3], [0, 1], given) == 0
        found = records.read(tmp_path / "basis.csv")
        assert [(row["width"], row["seed"]) for row in found] == [
            ("8", "0"),
            ("3", "0"),
            ("8", "1"),
            ("3", "1"),
        ]
    assert found[0]["energy"] == "mean=1.0000 cls=1.0000"
    held = {m: HiddenStateCache.open("whole-centred-3").sources[m]["energy"] for m in ("mean", "cls")}
    assert found[1]["energy"] == " ".join(f"{m}={sum(e) / 2:.4f}" for m, e in held.items())
    assert "cpu" not in found[0]["device"] and found[0]["filter_history"] == "none"
    written = tabulate.basis_table(found)
    mean = 50 * sum(float(row["test_hr@10"]) for row in found[1::2])
    assert "20 users ranked among all 25 items, filter_history=none" in written
    assert f"| 3 | {found[1]['energy']} | 0.0 |" in written and f"| 2 | {mean:.2f} ± " in written


def test_the_fewest_dimensions_within_noise() -> None:
    def rows(hits: list[float]) -> list[records.Row]:
        return [{"test_hr@10": str(hit), "test_ndcg@10": str(hit / 2)} for hit in hits]

    full = rows([0.12, 0.121, 0.122])
    groups = {384: full, 128: rows([0.119, 0.12, 0.121]), 64: rows([0.111, 0.112, 0.113])}
    assert tabulate.fewest_within_noise(groups) == 128
    assert tabulate.fewest_within_noise({384: full, 64: groups[64]}) == 384
    assert tabulate.fewest_within_noise({**groups, 32: full[:1]}) is None
