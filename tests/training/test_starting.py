"""A run that starts from another one, with an encoder more, or one fewer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crossan_fast import CrossanModel, HiddenStateCache
from crossan_fast._digests import sealed
from crossan_fast._growing import SHARE
from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer

PARTS = ("validation", "test")
OLD = ("towers.text", "towers.image", "heads.text", "heads.image")


@pytest.fixture
def wider(values: dict[str, Any], tmp_path: Path) -> str:
    """The world's cache with a third encoder."""
    cache = HiddenStateCache.open(values["cache"])
    states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
    states["sound"] = torch.randn(len(states["text"]), 3, 8, generator=torch.Generator().manual_seed(3))
    states["sound"][0] = 0
    write_cache(tmp_path / "wider", states, item_names=list(cache.item_names[1:]))
    return str(tmp_path / "wider")


def made(values: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(TrainConfig.from_dict({**values, **changes}))


def fitted(values: dict[str, Any], resume: bool = False, **changes: Any) -> Trainer:
    trainer = made(values, **changes)
    trainer.fit(progress=False, say=lambda line: None, resume=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture
def old(values: dict[str, Any], tmp_path: Path) -> Trainer:
    return fitted(values, run=str(tmp_path / "old"), epochs=4)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_grown_run_starts_where_the_other_ended(
    values: dict[str, Any], old: Trainer, wider: str, tmp_path: Path, backend: str
) -> None:
    from_ = {"cache": wider, "init_from": str(old.folder.path), "modalities": ["text", "image", "sound"]}
    trainer = made(values, **from_, backend=backend)
    assert trainer.config.freeze == ("text", "image")
    want = old.model.encode_catalogue(old.task.cache)
    have = trainer.model.encode_catalogue(trainer.task.cache)
    assert (have - want).abs().max() <= 4 * SHARE * want.abs().max()
    # But for the new expert's share it is the other run's model.
    without = trainer.model.remove("sound")
    torch.testing.assert_close(without.encode_catalogue(old.task.cache), want)
    held, found = (
        old.evaluate("test").metrics,
        trainer.task.evaluate(without, "test", trainer.config.evaluation),
    )
    assert found.metrics == pytest.approx(held)
    began = weights(trainer)
    trainer.fit(progress=False, say=lambda line: None)
    trained = trainer.folder.load_model("last").state_dict()
    for name, value in began.items():
        # What the new tower sends to the old ones is new, too.
        if name.startswith(OLD) and "sound" not in name:
            assert torch.equal(trained[name], value), name
        elif name not in ("item_popularity", "catalogue_digest"):
            assert not torch.equal(trained[name], value), name
    assert {f"towers.{tower}.cross.sound" for tower in ("text", "image")} < began.keys()


def test_a_grown_run_goes_on_without_the_run_it_came_from(
    values: dict[str, Any], old: Trainer, wider: str, tmp_path: Path
) -> None:
    from_ = {"cache": wider, "init_from": str(old.folder.path), "modalities": ["text", "image", "sound"]}
    straight = fitted(values, **from_, run=str(tmp_path / "straight"), epochs=4)
    fitted(values, **from_, run=str(tmp_path / "cut"), epochs=2)
    shutil.rmtree(old.folder.path)
    resumed = fitted(values, True, **from_, run=str(tmp_path / "cut"), epochs=4)
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)
    results = [json.loads(t.folder.results.read_text()) for t in (straight, resumed)]
    assert results[0]["test"] == results[1]["test"]
    with pytest.raises(ValueError, match=r"freeze: the run was made with \['text', 'image'\]"):
        fitted(values, True, **from_, run=str(tmp_path / "cut"), epochs=5, freeze=["text"])
    with pytest.raises(ValueError, match=r"(freeze|init_from): the run was made with "):
        fitted(values, True, **{**from_, "init_from": None}, run=str(tmp_path / "cut"), epochs=5)
    assert "init_from" not in json.loads((straight.folder.best / "training.json").read_text())["settings"]


def test_the_rest_is_let_go_in_a_run_behind_it(
    values: dict[str, Any], old: Trainer, wider: str, tmp_path: Path
) -> None:
    from_ = {"cache": wider, "modalities": ["text", "image", "sound"], "epochs": 1}
    grown = fitted(values, **from_, init_from=str(old.folder.path), run=str(tmp_path / "grown"))
    last = made(values, **from_, init_from=str(grown.folder.path), run=str(tmp_path / "last"))
    assert last.config.freeze == () and all(p.requires_grad for p in last.model.parameters())
    for name, value in grown.folder.load_model("best").state_dict().items():
        assert torch.equal(last.model.state_dict()[name], value), name
    part = made(values, **from_, init_from=str(old.folder.path), freeze=["image"], run=str(tmp_path / "p"))
    held = {n.split(".")[1] for n, p in part.model.named_parameters() if not p.requires_grad}
    assert held == {"image"}
    # Of runs that differ by where they started alone, files do not mix.
    other = fitted(values, run=str(tmp_path / "other"), epochs=4, seed=1)
    again = fitted(values, **from_, init_from=str(other.folder.path), run=str(tmp_path / "again"))
    names = [RunFolder(t.folder.path).run() for t in (grown, again)]
    assert all(names) and names[0] != names[1]


def test_a_run_with_one_encoder_fewer_starts_at_what_is_left(
    values: dict[str, Any], old: Trainer, tmp_path: Path
) -> None:
    smaller = made(values, init_from=str(old.folder.path), modalities=["image"], run=str(tmp_path / "less"))
    want = CrossanModel.from_pretrained(old.folder.best).remove("text")
    for name, value in want.state_dict().items():
        assert torch.equal(smaller.model.state_dict()[name], value), name
    assert smaller.config.freeze == ()


def test_a_run_says_where_the_other_may_have_seen_its_targets(
    values: dict[str, Any], old: Trainer, wider: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_ = {"init_from": str(old.folder.path), "epochs": 1}
    same = fitted(values, **from_, cache=wider, modalities=["text", "image", "sound"])
    assert [json.loads(same.folder.results.read_text())[part]["note"] for part in PARTS] == ["", ""]
    # All but the first user: the rest's targets are those of the other run.
    fewer = tmp_path / "fewer.tsv"
    fewer.write_text("".join(Path(values["users"]).read_text().splitlines(keepends=True)[1:]))
    ratio = {"by": "ratio", "validation": 0.2, "test": 0.2}
    seen = f"started from run {old.folder.run()}, which may have been trained on these targets: "
    cases = [
        ({"users": str(fewer)}, "48 users of 30 of 30 items before, 47 users of 30 of 30 items now"),
        ({"min_items": 6}, "48 users of 30 of 30 items before, 36 users of 30 of 30 items now"),
        ({"split": ratio}, "split.by 'leave_one_out' before, 'ratio' now"),
    ]
    for number, (changes, why) in enumerate(cases):
        said: list[str] = []
        run = made(values, **from_, **changes, run=str(tmp_path / f"run{number}"))
        run.fit(progress=False, say=said.append)
        results = json.loads(run.folder.results.read_text())
        for part in PARTS:
            assert results[part]["note"].startswith(seen) and why in results[part]["note"]
            assert results[part]["note"] in results[part]["protocol"]
        assert f"warning: {results['test']['note']}" in said
        assert results["test"]["note"] in (run.folder.best / "README.md").read_text()
    assert main(["evaluate", "--run", str(run.folder.path)]) == 0
    assert results["test"]["note"] in capsys.readouterr().out
    # What a run started from may have seen, one that starts from that may have seen, too.
    behind = made(values, split=ratio, epochs=1, init_from=str(run.folder.path), run=str(tmp_path / "behind"))
    assert behind.evaluate("test").note == results["test"]["note"]
    run.folder.population.unlink()
    unknown = made(values, split=ratio, epochs=1, init_from=str(run.folder.path), run=str(tmp_path / "x"))
    assert "does not say what it was trained on" in unknown.evaluate("test").note


def test_more_rows_that_name_no_targets_are_no_news(
    values: dict[str, Any], old: Trainer, tmp_path: Path
) -> None:
    cache = HiddenStateCache.open(values["cache"])
    states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
    grown = {name: torch.cat([state, state[1:3]]) for name, state in states.items()}
    write_cache(tmp_path / "grown", grown, item_names=[*cache.item_names[1:], "new", "newer"])
    from_ = {"cache": str(tmp_path / "grown"), "init_from": str(old.folder.path)}
    trainer = made(values, **from_, run=str(tmp_path / "wide"))
    assert trainer.task.split.num_items == 32 and trainer.evaluate("test").note == ""


def test_held_out_users_that_the_other_run_trained_on_are_told(
    values: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(values["users"]).read_text().splitlines(keepends=True)
    for name, part in (("most", lines[8:]), ("more", lines[4:]), ("held", lines[:8])):
        (tmp_path / f"{name}.tsv").write_text("".join(part))
    held = {"evaluation": {"users": str(tmp_path / "held.tsv")}, "epochs": 1}
    for name in ("most", "more"):
        old = fitted(values, **held, users=str(tmp_path / f"{name}.tsv"), run=str(tmp_path / name))
        given = {"users": str(tmp_path / "most.tsv"), "init_from": str(old.folder.path)}
        note = made(values, **held, **given, run=str(tmp_path / "new")).evaluate("test").note
        assert bool(note) == (name == "more")
    sizes = "48 users of 30 of 30 items"
    # All 48 users train or are held out in both; the other run knew four of the held-out ones.
    assert note.endswith(f"may have been trained on these targets: {sizes} as before, but other sequences")


def test_the_record_names_the_run_it_started_from(
    values: dict[str, Any], old: Trainer, tmp_path: Path
) -> None:
    assert "started_from" not in json.loads((old.folder.best / "training.json").read_text())
    from_ = {"init_from": str(old.folder.path), "min_items": 6}
    straight = fitted(values, **from_, run=str(tmp_path / "straight"), epochs=2)
    fitted(values, **from_, run=str(tmp_path / "cut"), epochs=1)
    name = old.folder.run()
    old.folder.path.rename(tmp_path / "moved")
    resumed = fitted(values, True, **from_, run=str(tmp_path / "cut"), epochs=2)
    for trainer in (straight, resumed):
        record = json.loads((trainer.folder.best / "training.json").read_text())
        assert record["started_from"] == name
        assert f"from the weights of run `{name}`" in (trainer.folder.best / "README.md").read_text()
        assert json.loads(trainer.folder.population.read_text())["origin"] == name
        assert f"run {name}, which may have" in record["test"]["note"]
    assert straight.folder.population.read_bytes() == resumed.folder.population.read_bytes()
    forged = {**{key: value for key, value in record.items() if key != "sha256"}, "started_from": [name]}
    (resumed.folder.best / "training.json").write_text(json.dumps(sealed(forged)))
    with pytest.raises(ValueError, match=r"training\.json: expected .* started_from: expected text"):
        CrossanModel.from_pretrained(resumed.folder.best)


def test_where_the_other_run_lies_is_no_part_of_a_run(
    values: dict[str, Any], old: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["old", "./old", str(old.folder.path)]
    runs = [fitted(values, init_from=place, run=f"r{n}", epochs=1) for n, place in enumerate(places)]
    assert len({run.folder.run() for run in runs}) == 1
    assert runs[0].folder.run() not in ("", old.folder.run())
    old.folder.path.rename(tmp_path / "moved")
    resumed = fitted(values, True, init_from="moved", run="r0", epochs=2)
    assert [entry["epoch"] for entry in resumed.history] == [1, 2]
    with pytest.raises(ValueError, match=r"(freeze|init_from): the run was made with .* got None"):
        fitted(values, True, init_from=None, run="r0", epochs=3)
    fresh = fitted(values, run="fresh", epochs=1)
    with pytest.raises(ValueError, match=r"(freeze|init_from): the run was made with None"):
        fitted(values, True, init_from="moved", run=str(fresh.folder.path), epochs=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"bottleneck": 4}}, r"model.bottleneck: .*old has 8, expected the same, got 4"),
        ({"modalities": ["sound", "text"]}, r"modalities: expected those of .* first, .*\['text', 'sound'\]"),
        ({"modalities": ["sound"]}, r"init_from: .* knows \['text', 'image'\], expected one of \['sound'\]"),
        ({"freeze": ["txt"]}, r"freeze: expected some of \['text', 'image', 'sound'\], got 'txt'"),
        ({"init_from": None, "freeze": ["text"]}, "freeze: expected null without init_from"),
    ],
    ids=["weights", "order", "nothing kept", "frozen", "no run"],
)
def test_what_cannot_be_started_from_is_named(
    values: dict[str, Any], old: Trainer, wider: str, changes: dict[str, Any], message: str
) -> None:
    changes = {**changes, "model": {**values["model"], **changes.get("model", {})}}
    given = {"cache": wider, "init_from": str(old.folder.path), "modalities": ["text", "image", "sound"]}
    with pytest.raises(ValueError, match=message):
        made(values, **{**given, **changes})


def test_ids_are_those_of_the_other_run(values: dict[str, Any], wider: str, tmp_path: Path) -> None:
    values["model"] |= {"id_embedding": True}
    old = fitted(values, run=str(tmp_path / "old"), epochs=1)
    cache = HiddenStateCache.open(wider)
    states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
    write_cache(tmp_path / "turned", states, item_names=list(cache.item_names[1:])[::-1])
    given = {"init_from": str(old.folder.path), "modalities": ["text", "image", "sound"]}
    with pytest.raises(ValueError, match="init_from: its rows are of 30 items"):
        made(values, **given, cache=str(tmp_path / "turned"))
    grown = made(values, **given, cache=wider)
    assert torch.equal(grown.model.id_embedding.weight, old.folder.load_model("best").id_embedding.weight)


def test_states_are_those_of_the_other_run(values: dict[str, Any], wider: str, tmp_path: Path) -> None:
    def based(cache: str, name: str, width: int) -> str:
        folder = str(tmp_path / name)
        assert main(["cache", "convert", cache, "--out", folder, "--basis", f"text={width}"]) == 0
        return folder

    old = fitted(values, run=str(tmp_path / "old"), epochs=1, cache=based(values["cache"], "narrow", 7))
    given = {"init_from": str(old.folder.path), "modalities": ["text", "image", "sound"]}
    with pytest.raises(ValueError, match=r"was trained on Modality\(name='text', width=7.* got .*width=6"):
        made(values, **given, cache=based(wider, "narrower", 6))
    cache = HiddenStateCache.open(wider)
    states = {m.name: s.clone() for m, s in zip(cache.modalities, cache.states("cpu"), strict=True)}
    states["text"] = states["text"].flip(2)
    write_cache(tmp_path / "flipped", states, item_names=list(cache.item_names[1:]))
    with pytest.raises(ValueError, match="modality 'text': expected states in basis or centring"):
        made(values, **given, cache=based(str(tmp_path / "flipped"), "other", 7))
    made(values, **given, cache=based(wider, "same", 7))


def test_the_command_counts_what_it_trains(
    values: dict[str, Any], old: Trainer, wider: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**values, "cache": wider, "epochs": 1}))
    arguments = ["train", str(config), f"init_from={old.folder.path}", "modalities=[text, image, sound]"]
    assert main([*arguments, f"run={tmp_path / 'grown'}", "--quiet"]) == 0
    model = RunFolder(tmp_path / "grown").load_model("best")
    held = sum(p.numel() for n, p in model.named_parameters() if n.startswith(OLD) and "sound" not in n)
    total = sum(p.numel() for p in model.parameters())
    assert f"parameters to train: {total - held:,}" in capsys.readouterr().out
