"""`crossan-fast recommend`, also for items that came after training."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from crossan_fast.cache import HiddenStateCache
from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main
from crossan_fast.cli._name_files import names_in
from crossan_fast.cli._recommended import Row, open_writer


def recommend(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    assert main(["recommend", "--run", str(run), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split(maxsplit=3) for line in lines if not line.startswith("history")]


def test_names_titles_and_scores_in_order(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder / "run"
    rows = recommend(capsys, run, "--history", "b03", "b04", "b05", "--k", "4")
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(row[3] == f"Title {row[1]}" for row in rows)
    assert "b06" in [row[1] for row in rows], "what follows b05 in every history"
    assert not {"b03", "b04", "b05"} & {row[1] for row in rows}
    everything = recommend(capsys, run, "--history", "b03", "b04", "b05", "--k", "24", "--keep-history")
    assert {"b03", "b04", "b05"} < {row[1] for row in everything}
    assert main(["recommend", "--run", str(run), "--history", "b07"]) == 0
    assert "history  b07  Title b07" in capsys.readouterr().out


def test_items_appended_after_training_are_ranked(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new item that is a copy of a known one is recommended right beside it."""
    old = HiddenStateCache.open(run_folder / "cache")
    (states,) = old.states("cpu")
    best = recommend(capsys, run_folder / "run", "--history", "b03", "b04", "--k", "1")[0][1]
    twin = states[old.row_of(best)][None]
    grown = tmp_path / "grown"
    write_cache(grown, {"text": torch.cat([states, twin])}, item_names=[*old.item_names[1:], "newcomer"])
    rows = recommend(capsys, run_folder / "run", "--history", "b03", "b04", "--k", "2", "--cache", str(grown))
    assert {row[1] for row in rows} == {best, "newcomer"}
    assert rows[0][2] == rows[1][2]


def test_a_run_without_an_items_file_prints_names(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    config = run / "config.yaml"
    # The first line is the digest of what was there.
    lines = [line for line in config.read_text().splitlines()[1:] if not line.startswith("items:")]
    config.write_text("\n".join(lines))
    rows = recommend(capsys, run, "--history", "b03", "--k", "2")
    assert [len(row) for row in rows] == [3, 3]


HISTORIES = "who,item,timestamp\nx,b03,1\nx,b04,2\nx,gone,3\ny,b10,5\ny,b09,4\nz,gone,1\n"


def read_back(path: Path) -> list[tuple[str, int, str, str]]:
    if path.suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow").read_table(path).to_pylist()
    elif path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        entries = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        rows = [
            {"user": entry["user"], "rank": rank, **item}
            for entry in entries
            for rank, item in enumerate(entry["items"], start=1)
        ]
    else:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    return [(row["user"], int(row["rank"]), row["item"], row.get("title") or "") for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_histories_from_a_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    (tmp_path / "users.csv").write_text(HISTORIES)
    (tmp_path / "deny.txt").write_text("b05\n")
    out = tmp_path / f"out{suffix}"
    arguments = ["recommend", "--run", str(run_folder / "run"), "--histories", str(tmp_path / "users.csv")]
    arguments += ["--user-column", "who", "--k", "3", "--deny", str(tmp_path / "deny.txt"), "--out", str(out)]
    assert main(arguments) == 2
    assert "gone" in capsys.readouterr().err and not out.exists(), "unknown items are an error unless skipped"
    assert main([*arguments, "--unknown", "skip", "--batch-size", "1"]) == 0
    said = capsys.readouterr().err
    assert (
        "2 users in" in said and "1 users without a known item, 2 interactions with 1 unknown items" in said
    )
    found = read_back(out)
    assert [row[:2] for row in found] == [(user, rank) for user in "xy" for rank in (1, 2, 3)]
    alone = recommend(
        capsys,
        run_folder / "run",
        "--history",
        "b09",
        "b10",
        "--k",
        "3",
        "--deny",
        str(tmp_path / "deny.txt"),
    )
    assert [row[2] for row in found[3:]] == [row[1] for row in alone]
    assert all(row[3] == f"Title {row[2]}" for row in found)
    assert "b05" not in {row[2] for row in found}


def test_titles_of_items_added_later_and_csv_to_stdout(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = HiddenStateCache.open(run_folder / "cache")
    (states,) = old.states("cpu")
    grown, more = tmp_path / "grown", tmp_path / "more.tsv"
    write_cache(grown, {"text": torch.cat([states, states[3:4]])}, item_names=[*old.item_names[1:], "new"])
    more.write_text("new\tA newcomer\n")
    (tmp_path / "users.tsv").write_text("x\tb00 b01\n")
    (tmp_path / "allow.txt").write_text("new\nb09\n")
    arguments = ["recommend", "--run", str(run_folder / "run"), "--histories", str(tmp_path / "users.tsv")]
    arguments += ["--cache", str(grown), "--allow", str(tmp_path / "allow.txt"), "--k", "2"]
    assert main(arguments) == 0
    assert "1 of the cache's items have no title; --items adds some" in capsys.readouterr().err
    assert main([*arguments, "--items", str(more)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["item"]: row["title"] for row in rows} == {"new": "A newcomer", "b09": "Title b09"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "99"], "k: expected 1 to 24, the number of candidates, got 99"),
        (["--out", "best.xlsx"], "--out: expected a name that ends with .csv"),
        (["--deny", "nowhere"], "no such file: nowhere"),
        (
            ["--user-column", "u", "--time-column", "t"],
            "--user-column, --time-column: expected --histories beside it, got --history",
        ),
        (["--batch-size", "64"], "--batch-size: expected --histories beside it, got --history"),
    ],
)
def test_bad_arguments_are_named(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["recommend", "--run", str(run_folder / "run"), "--history", "b01", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_json_says_what_the_table_says(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder / "run"
    rows = recommend(capsys, run, "--history", "b03", "b04", "--k", "3")
    assert main(["recommend", "--run", str(run), "--history", "b03", "b04", "--k", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["history"][1] == {"item": "b04", "title": "Title b04"}
    assert [[str(i["rank"]), i["item"], f"{i['score']:.4f}", i["title"]] for i in printed["items"]] == rows


def test_every_file_of_deny_and_allow_counts(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder / "run"
    for name in ("b06", "b07"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    files = [str(tmp_path / f"{name}.txt") for name in ("b06", "b07")]
    denied = ["--history", "b05", "--k", "20", "--deny", files[0], "--deny", files[1]]
    assert not {"b06", "b07"} & {row[1] for row in recommend(capsys, run, *denied)}
    allowed = ["--history", "b05", "--k", "2", "--allow", *files]
    assert {row[1] for row in recommend(capsys, run, *allowed)} == {"b06", "b07"}


def test_names_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"i24", "i39", "lamp, red", "a\tb", "7"}
    path = tmp_path / "names"

    def names(text: str, *more: str) -> list[str]:
        path.write_text(text)
        return names_in([path], "--deny", {*known, *more})

    assert names("i24\n\n i39 \r\n") == ["i24", "i39"]
    assert names("lamp, red\ni24\na\tb\n") == ["lamp, red", "i24", "a\tb"]
    assert names('"lamp, red"\n"gone, too"\n') == ["lamp, red", "gone, too"]
    assert names("item,count\ni24,3\ni39,4\n") == ["i24", "i39"]
    assert names('{"asin": "i24", "n": 1}\n') == ["i24"]
    assert names("id\ni24\n") == ["i24"] and names("id\ni24\n", "id") == ["id", "i24"]
    assert names("id\n", "id") == ["id"] and not capsys.readouterr().err
    assert names("id\n") == []
    assert "no names, its only line id is taken for a header" in capsys.readouterr().err
    for text, line in (("i24,i39\n", 1), ("i24\ni24\ti39\n", 2), ("i24\n\ni39;i24\n", 3)):
        with pytest.raises(ValueError, match=rf"--deny: .*names, line {line}: expected one item's name"):
            names(text)
    with pytest.raises(ValueError, match=r"--deny: .*: expected a column of items, got n, m"):
        names('{"n": "i24", "m": 1}\n')


@pytest.mark.parametrize(("suffix", "lines"), [(".json", ["[]"]), (".jsonl", [])])
def test_json_of_no_user_is_json(tmp_path: Path, suffix: str, lines: list[str]) -> None:
    out = tmp_path / f"out{suffix}"
    with open_writer(out) as write:
        write([])
    assert out.read_text().splitlines() == lines
    with open_writer(out) as write:
        for user in "xyz":
            write([Row(user, rank, f"i{rank}", 0.5, "") for rank in (1, 2)])
    text = out.read_text()
    entries = json.loads(text) if suffix == ".json" else list(map(json.loads, text.splitlines()))
    assert text.endswith("\n") and [entry["user"] for entry in entries] == ["x", "y", "z"]
    assert entries[2]["items"] == [{"item": "i1", "score": 0.5}, {"item": "i2", "score": 0.5}]


def test_what_a_run_would_not_have_trained_on_is_left_out(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    # The first line is the digest of what was there.
    text = "\n".join((run / "config.yaml").read_text().splitlines()[1:])
    (run / "config.yaml").write_text(text.replace("min_rating: null", "min_rating: 4.0"))
    (tmp_path / "rated.csv").write_text("user,item,time,rating\nx,b03,1,5\nx,b04,2,4\nx,b15,3,1\n")
    (tmp_path / "kept.csv").write_text("user,item,time\nx,b03,1\nx,b04,2\n")
    found = {}
    for name, said in (
        ("rated", "1 rated below the run's min_rating 4.0"),
        (
            "kept",
            "kept.csv has no ratings; all its interactions count, the run's own were those rated at",
        ),
    ):
        words = ["--histories", str(tmp_path / f"{name}.csv"), "--k", "5"]
        assert main(["recommend", "--run", str(run), *words]) == 0
        printed = capsys.readouterr()
        assert said in printed.err
        found[name] = printed.out
    assert found["rated"] == found["kept"]
