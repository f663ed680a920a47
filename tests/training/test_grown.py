"""A cache that grew after a run began: the run goes on, and is evaluated, on the items that were its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast import CrossanModel, HiddenStateCache
from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer, evaluate, open_task

NEW = 6


@pytest.fixture
def shop(world: Path, tmp_path: Path) -> Path:
    """The world, with users who also took items that its cache does not hold yet."""
    here = tmp_path / "shop"
    shutil.copytree(world, here)
    lines = (here / "users.tsv").read_text().splitlines()
    lines = [f"{line} new{k % NEW}" if k % 3 == 0 else line for k, line in enumerate(lines)]
    lines += [f"late{k}\t" + " ".join(f"new{(k + j) % NEW}" for j in range(6)) for k in range(7)]
    (here / "users.tsv").write_text("\n".join(lines) + "\n")
    return here


@pytest.fixture
def settings(values: dict[str, Any], shop: Path) -> dict[str, Any]:
    return {**values, "cache": str(shop / "cache"), "users": str(shop / "users.tsv")}


def grow(folder: Path, extra: int = NEW, *, shuffled: bool = False) -> None:
    cache = HiddenStateCache.open(folder)
    states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
    for name, state in states.items():
        states[name] = torch.cat([state, torch.randn(extra, *state.shape[1:])])
    names = [*cache.item_names[1:], *(f"new{k}" for k in range(extra))]
    write_cache(folder, states, item_names=names[::-1] if shuffled else names, overwrite=True)


def config(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**settings, **changes})


def fit(wanted: TrainConfig, **options: Any) -> tuple[Trainer, list[str]]:
    said: list[str] = []
    trainer = Trainer(wanted)
    trainer.fit(progress=False, say=said.append, **options)
    return trainer, said


@pytest.mark.filterwarnings("ignore:users. .*dropped")
@pytest.mark.filterwarnings("ignore:cache. it has grown")
@pytest.mark.parametrize("candidates", ["used", "all"])
@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_resuming_goes_on_with_the_runs_own_items(
    settings: dict[str, Any], shop: Path, tmp_path: Path, loss: str, candidates: str
) -> None:
    settings["model"] |= {"loss": loss, "modality_dropout": 0.2}
    settings["evaluation"] = {"candidates": candidates}
    straight, _ = fit(config(settings, epochs=3, run=str(tmp_path / "straight")))
    fit(config(settings, epochs=2, run=str(tmp_path / "cut")))
    grow(shop / "cache")
    resumed, said = fit(config(settings, epochs=3, run=str(tmp_path / "cut")), resume=True)
    assert f"{NEW} items of the cache came after the run began and take no part in it" in said
    assert "of the run's own 30" in resumed.task.describe()
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    results = [json.loads(trainer.folder.results.read_text())["test"] for trainer in (straight, resumed)]
    for key in ("metrics", "users", "candidates"):
        assert results[0][key] == pytest.approx(results[1][key]), key
    assert results[0]["note"] == ""
    assert results[1]["note"] == "the split knows 30 of the cache's 36 items"
    assert resumed.model.catalogue == straight.model.catalogue


@pytest.mark.filterwarnings("ignore:users. .*dropped")
def test_a_run_is_not_continued_on_other_items_or_users(settings: dict[str, Any], shop: Path) -> None:
    fit(config(settings, epochs=1))
    kept = (shop / "users.tsv").read_text()
    (shop / "users.tsv").write_text(kept + "late\t" + " ".join(f"item{k}" for k in range(3, 10)) + "\n")
    with pytest.raises(
        ValueError, match=r"expected those of the run .* 48 users of 30 of 30 items before, 49 u"
    ):
        fit(config(settings, epochs=2), resume=True)
    swapped = kept.replace("item7 item8", "item8 item7")
    assert swapped != kept
    (shop / "users.tsv").write_text(swapped)
    with pytest.raises(ValueError, match="48 users of 30 of 30 items as before, but other sequences"):
        fit(config(settings, epochs=2), resume=True)
    (shop / "users.tsv").write_text(kept)
    grow(shop / "cache", shuffled=True)
    with pytest.raises(ValueError, match="run: its rows are of 30 items, the cache has 36 and other names"):
        fit(config(settings, epochs=2), resume=True)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.filterwarnings("ignore:users. .*dropped")
def test_evaluating_a_run_repeats_its_numbers(
    settings: dict[str, Any], shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(config(settings, epochs=1))
    run = str(trainer.folder.path)
    before = printed(capsys, "evaluate", "--run", run)
    assert before == json.loads(trainer.folder.results.read_text())["test"]
    grow(shop / "cache")
    after = printed(capsys, "evaluate", "--run", run)
    numbers = ("metrics", "users", "candidates", "split", "filter_history")
    assert {key: after[key] for key in numbers} == {key: before[key] for key in numbers}
    assert after["protocol"].endswith("; the split knows 30 of the cache's 36 items")
    everything = printed(capsys, "evaluate", "--run", run, "--catalogue", "all")
    assert (everything["users"], everything["candidates"]) == (55, 36)
    assert everything["note"] == (
        "not what the run was evaluated on: 48 users of 30 of 30 items before, 55 users of 36 of 36 items now"
    )
    grow(shop / "cache", 0, shuffled=True)
    assert main(["evaluate", "--run", run]) == 2
    assert "run: its rows are of 30 items, the cache has 36 and other names" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:users. .*dropped")
def test_recommending_says_what_came_after_training(
    settings: dict[str, Any], shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(config(settings, epochs=1))
    arguments = ["recommend", "--run", str(trainer.folder.path), "--history", "item3"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    grow(shop / "cache")
    assert main([*arguments, "--k", "36"]) == 0
    shown = capsys.readouterr()
    assert shown.err == (
        "note: 6 of the cache's 36 items came after training\n"
        "note: 6 of the cache's items have no title; --items adds some\n"
    )
    assert "new5" in shown.out


@pytest.mark.filterwarnings("ignore:users. .*dropped")
def test_a_split_meets_a_cache(settings: dict[str, Any], shop: Path) -> None:
    trainer, _ = fit(config(settings, epochs=1, evaluation={"candidates": "all"}))
    model = CrossanModel.from_pretrained(trainer.folder.best)
    split = trainer.task.split
    own = evaluate(model, trainer.task.cache, split)
    grow(shop / "cache")
    grown = HiddenStateCache.open(shop / "cache")
    again = evaluate(model, grown, split)
    assert (again.metrics, again.users, again.candidates) == (own.metrics, own.users, own.candidates)
    assert again.note == "the split knows 30 of the cache's 36 items"
    ranked = torch.cat([split.test_target.unique(), torch.tensor([36])])
    assert evaluate(model, grown, split, candidates=ranked).candidates == len(ranked)
    with pytest.raises(ValueError, match="candidates: expected rows 1 to 36 of the cache, got 37"):
        evaluate(model, grown, split, candidates=ranked.clamp_min(37), k=(1,))
    whole = open_task(config(settings)).split
    assert evaluate(model, grown, whole).candidates == 36, "users and items need not have been trained on"
    with pytest.raises(ValueError, match="split: its rows are of 36 items, the cache has 30"):
        evaluate(model, trainer.task.cache, whole)
    grow(shop / "cache", 0, shuffled=True)
    with pytest.raises(
        ValueError, match=r"split: .* row 1 is 'item1' there and 'new5' in the cache; a split"
    ):
        evaluate(model, HiddenStateCache.open(shop / "cache"), split)


def test_a_run_of_before_populations_were_kept_is_evaluated(
    settings: dict[str, Any], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(config(settings, epochs=1, users=str(world / "users.tsv")))
    folder = RunFolder(trainer.folder.path)
    folder.population.write_text("{}")
    assert main(["evaluate", "--run", str(folder.path)]) == 2
    assert "population.json cannot be read" in capsys.readouterr().err
    folder.population.unlink()
    result = printed(capsys, "evaluate", "--run", str(folder.path))
    assert result == json.loads(folder.results.read_text())["test"]
    fit(config(settings, epochs=2, users=str(world / "users.tsv")), resume=True)
    assert folder.read_population() is not None, "kept from now on"
