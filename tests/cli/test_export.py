"""`crossan-fast export`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from crossan_fast import CrossanModel, HiddenStateCache
from crossan_fast.cli import main


def recommended(run: Path, history: list[str]) -> list[tuple[str, float]]:
    model = CrossanModel.from_pretrained(run / "best")
    cache = HiddenStateCache.open(run.parent / "cache")
    found = model.recommend([history], cache, k=cache.num_items, filter_history=False)[0]
    return [(item.name, item.score) for item in found]


def test_products_of_the_files_are_what_recommend_ranks_by(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    run = run_folder / "run"
    paths = [str(tmp_path / name) for name in ("items.npy", "users.npy", "items.parquet", "users.parquet")]
    assert main(["export", str(run), "--embeddings", *paths[:2]]) == 0
    assert "24 items of 16 numbers" in capsys.readouterr().out
    assert main(["export", str(run), "--embeddings", *paths[2:]]) == 0
    arrays = {}
    for kind in ("items", "users"):
        array = np.load(tmp_path / f"{kind}.npy")
        names = json.loads((tmp_path / f"{kind}.names.json").read_text())
        table = pyarrow.read_table(tmp_path / f"{kind}.parquet")
        assert table.column("name").to_pylist() == names
        assert np.array_equal(np.array(table.column("embedding").to_pylist(), dtype=np.float32), array)
        assert array.dtype == np.float32 and array.shape == (len(names), 16)
        arrays[kind] = names, array
    (item_names, items), (user_names, users) = arrays["items"], arrays["users"]
    lines = (run_folder / "users.tsv").read_text().splitlines()
    assert user_names == [line.split("\t")[0] for line in lines]
    for row in (0, 7):
        best = recommended(run, lines[row].split("\t")[1].split())
        scores = dict(zip(item_names, (items @ users[row]).tolist(), strict=True))
        assert [name for name, _ in best] == sorted(scores, key=lambda name: -scores[name])
        assert [score for _, score in best] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)


def test_other_users_and_what_is_wrong(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(run_folder / "run"), str(tmp_path / "items.npy")
    (tmp_path / "others.tsv").write_text("new\tb03 b04 nothing\n")
    users = str(tmp_path / "users.npy")
    words = ["export", run, "--embeddings", out, users, "--users", str(tmp_path / "others.tsv")]
    assert main(words) == 0
    assert "1 users after their whole histories; left out: 1" in capsys.readouterr().out
    assert np.load(users).shape == (1, 16)
    for words, message in (
        ([], "--onnx, --embeddings: expected one of the two, got neither"),
        (["--embeddings", "a.txt"], "embeddings: expected a name that ends with .npy or .parquet"),
        (["--embeddings", out, out, out], "expected a file for items and one for users, got 3"),
        (
            ["--embeddings", out, str(tmp_path / ".." / tmp_path.name / "items.npy")],
            "--embeddings: expected different files for items and for users, got ",
        ),
        (
            ["--embeddings", out, "--users", "u.tsv", "--item-column", "i"],
            "--users, --item-column: expected with a second file of --embeddings, for the users', got 1",
        ),
        (["--onnx", str(tmp_path), "--users", "u.tsv"], "--users: expected with a second file"),
    ):
        assert main(["export", run, *words]) == 2
        assert message in capsys.readouterr().err


def test_onnx_is_written_from_a_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr("crossan_fast.export.write_onnx", lambda model, folder: written.append(folder))
    assert main(["export", str(run_folder / "run"), "--onnx", str(tmp_path / "onnx")]) == 0
    assert written == [tmp_path / "onnx"]


def test_users_of_a_split_in_files_have_their_whole_histories(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run_folder / "users.tsv").read_text().splitlines()
    histories = {user: items.split() for user, items in (line.split("\t") for line in lines)}
    whole = "".join(f"{u},{i},{at}\n" for u, items in histories.items() for at, i in enumerate(items))
    (tmp_path / "whole.csv").write_text("user,item,time\n" + whole)
    for part, start, stop in (("train", 0, -2), ("valid", -2, -1), ("test", -1, None)):
        rows = [
            f"{user},{item},{at}\n"
            for user, items in histories.items()
            for at, item in list(enumerate(items))[start:stop]
        ]
        (tmp_path / f"x.{part}.csv").write_text("user,item,time\n" + "".join(rows))
    run, out = str(tmp_path / "run"), [str(tmp_path / name) for name in ("items.npy", "users.npy")]
    words = [f"run={run}", f"users={tmp_path / 'x.train.csv'}", "split.by=given", "epochs=1", "min_items=1"]
    assert main(["train", str(run_folder / "config.yaml"), "--quiet", *words]) == 0
    assert main(["export", run, "--embeddings", *out]) == 0
    found = np.load(tmp_path / "users.npy")
    assert main(["export", run, "--embeddings", *out, "--users", str(tmp_path / "whole.csv")]) == 0
    assert np.array_equal(found, np.load(tmp_path / "users.npy"))
