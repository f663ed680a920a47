"""What a run says of the data that it was made with, and what is compared with it where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crossan_fast._digests import sealed
from crossan_fast.cli import main
from crossan_fast.training import RunFolder, TrainConfig, Trainer


def made(values: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(TrainConfig.from_dict({**values, **changes}))


def fitted(values: dict[str, Any], resume: bool = False, **changes: Any) -> RunFolder:
    trainer = made(values, **changes)
    trainer.fit(progress=False, say=lambda line: None, resume=resume)
    return trainer.folder


@pytest.fixture
def held_out(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that trains on 40 users and is evaluated on eight others."""
    lines = Path(values["users"]).read_text().splitlines(keepends=True)
    for name, part in (("held", lines[:8]), ("users", lines[8:])):
        (tmp_path / f"{name}.tsv").write_text("".join(part))
    held = {"users": str(tmp_path / "held.tsv")}
    return {**values, "users": str(tmp_path / "users.tsv"), "evaluation": held, "epochs": 1}


@pytest.fixture
def by_time(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on a log of 20 users over 9 days: the last five were gone before the eighth, and the
    last of these before the seventh."""
    rows = [
        f"u{user},item{(user + day) % 30 + 1},2020-03-0{day + 1}\n"
        for user in range(20)
        for day in range(9 if user < 15 else 7 if user < 19 else 6)
    ]
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(rows))
    split = {"by": "time", "validation": "2020-03-07", "test": "2020-03-08"}
    return {**values, "users": str(tmp_path / "log.csv"), "split": split, "epochs": 1}


def swap_items(settings: dict[str, Any]) -> str:
    """Swap the first two items of the first user; gives the file as it was."""
    path = Path(settings["users"])
    text = path.read_text()
    user, items = text.split("\n", 1)[0].split("\t")
    first, second, *rest = items.split()
    path.write_text(text.replace(f"{user}\t{items}", f"{user}\t{' '.join([second, first, *rest])}"))
    assert path.read_text() != text
    return text


def old_record(run: RunFolder) -> None:
    """As versions wrote it that kept no digests but of what ends in a test target."""
    body = json.loads(run.population.read_text())
    kept = {key: value for key, value in body.items() if key not in ("training", "validation", "sha256")}
    run.population.write_text(json.dumps(sealed(kept)))


def test_resuming_takes_no_other_users_to_train_on(held_out: dict[str, Any]) -> None:
    run = fitted(held_out)
    fitted(held_out, True, epochs=2)
    kept = swap_items(held_out)
    with pytest.raises(ValueError, match=r"48 users of 30 of 30 .* before, but other sequences to train on$"):
        fitted(held_out, True, epochs=3)
    old_record(run)
    fitted(held_out, True, epochs=3)  # nothing is known of it, as before
    Path(held_out["users"]).write_text(kept)
    fitted(held_out, True, epochs=4)


def test_resuming_takes_no_others_of_a_split_by_time(by_time: dict[str, Any]) -> None:
    fitted(by_time)
    fitted(by_time, True, epochs=2)
    path = Path(by_time["users"])
    kept = path.read_text()
    # The last user only trains; the one before also validates.
    for changed, what in (("u19,item20,", "train"), ("u18,item25,", "validate")):
        assert kept.count(changed) == 1
        path.write_text(kept.replace(changed, changed.split(",")[0] + ",item1,"))
        with pytest.raises(ValueError, match=f"users: expected those of the run .* sequences to {what} on"):
            fitted(by_time, True, epochs=3)
    path.write_text(kept)
    fitted(by_time, True, epochs=3)


def evaluated(capsys: pytest.CaptureFixture[str], run: RunFolder, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run.path), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_evaluating_says_what_its_numbers_rest_on(
    by_time: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted(by_time)
    path, validation = Path(by_time["users"]), ("--split", "validation")
    own = evaluated(capsys, run), evaluated(capsys, run, *validation)
    kept = path.read_text()
    path.write_text(kept.replace("u18,item25,", "u18,item1,"))  # a validation target
    assert evaluated(capsys, run) == own[0]
    note = "not what the run was evaluated on: 20 users of 25 of 30 items as before, but other sequences to "
    assert evaluated(capsys, run, *validation)["note"] == note + "validate on"
    path.write_text(kept.replace("u19,item20,", "u19,item1,"))  # trained on, and no more
    assert (evaluated(capsys, run), evaluated(capsys, run, *validation)) == own
    for option in ("--lists", "--baselines"):
        note = evaluated(capsys, run, option)["note"]
        assert note.startswith("not what the run was trained on: ") and note.endswith("to train on")
    old_record(run)
    assert evaluated(capsys, run, "--lists")["note"] == ""


def test_only_targets_count_for_what_another_run_may_have_seen(
    held_out: dict[str, Any], by_time: dict[str, Any], tmp_path: Path
) -> None:
    run = fitted(held_out, run=str(tmp_path / "old"))
    swap_items(held_out)
    assert made(held_out, init_from=str(run.path)).evaluate("test").note == ""
    run = fitted(by_time, run=str(tmp_path / "timed"))
    path = Path(by_time["users"])
    path.write_text(path.read_text().replace("u18,item25,", "u18,item1,"))
    note = made(by_time, init_from=str(run.path)).evaluate("test").note
    assert "may have been trained on these targets: 20 users" in note
    assert note.endswith("as before, but other sequences to validate on")
    old_record(run)
    assert made(by_time, init_from=str(run.path)).evaluate("test").note == ""


def test_a_record_of_before_is_read_and_a_forged_one_is_not(values: dict[str, Any], tmp_path: Path) -> None:
    run = fitted(values, epochs=1)
    held = run.read_population()
    assert held is not None and len({held.sequences, held.training, held.validation}) == 3
    shutil.copy(run.population, tmp_path / "kept.json")
    old_record(run)
    before = run.read_population()
    assert before == held and before.training == before.validation == ""
    before.write(run.population)
    assert not {"training", "validation"} & json.loads(run.population.read_text()).keys()
    body = json.loads((tmp_path / "kept.json").read_text())
    for wrong in ("x", 3, [], None):
        forged = {k: v for k, v in body.items() if k != "sha256"} | {"training": wrong}
        run.population.write_text(json.dumps(sealed(forged)))
        with pytest.raises(ValueError, match=r"population\.json cannot be read: training: expected 64 hex"):
            run.read_population()
