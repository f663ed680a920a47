"""`crossan-fast evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from crossan_fast import HiddenStateCache
from crossan_fast.cache.convert import convert_cache
from crossan_fast.cache.writer import write_cache
from crossan_fast.cli import main


def evaluate(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_repeats_what_training_reported(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder / "run"
    results = json.loads((run / "results.json").read_text())
    assert evaluate(capsys, run) == results["test"]
    assert evaluate(capsys, run, "--split", "validation") == results["validation"]


def test_options_change_the_protocol_that_is_printed(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder / "run"
    result = evaluate(capsys, run, "--filter-history", "none", "--k", "1", "3")
    assert result["filter_history"] == "none"
    assert list(result["metrics"]) == ["hr@1", "ndcg@1", "hr@3", "ndcg@3", "mrr"]
    assert main(["evaluate", "--run", str(run), "--filter-history", "all", "--checkpoint", "last"]) == 0
    printed = capsys.readouterr().out
    assert "test targets of 30 users, full ranking of 24 items, filter_history=all, ties" in printed
    assert "HR@k %" in printed


def test_another_cache_is_ranked_with(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted, noisy = run_folder / "int8", run_folder / "noise"
    convert_cache(run_folder / "cache", converted, "int8")
    cache = HiddenStateCache.open(run_folder / "cache")
    states = torch.randn_like(cache.states("cpu")[0])
    states[0] = 0
    write_cache(noisy, {"text": states}, item_names=cache.item_names[1:])
    run = run_folder / "run"
    own = evaluate(capsys, run)["metrics"]["hr@10"]
    assert evaluate(capsys, run, "--cache", str(converted))["metrics"]["hr@10"] == pytest.approx(
        own, abs=0.05
    )
    assert main(["evaluate", "--run", str(run), "--cache", str(noisy)]) == 2
    assert "cache: modality 'text': expected the imported states that" in capsys.readouterr().err


def test_users_that_the_run_never_saw(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others.csv"
    rows = [f"{user},b{(3 + step):02},{step}\n" for user in ("new", "u1") for step in range(6)]
    others.write_text("client,item,timestamp\n" + "".join(rows))
    arguments = ("--users", str(others), "--user-column", "client")
    found = evaluate(capsys, run_folder / "run", *arguments)
    assert found["users"] == 1 and "users held out" in found["protocol"], "u1 was trained on"
    assert main(["evaluate", "--run", str(run_folder / "run"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "user 'client'" in printed and "1 users of the evaluation file who are trained on" in printed


def test_columns_of_another_file_are_not_those_of_the_run_s_own(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own file has a column of the name that the other's users stand in, of other people."""
    run, own, other = tmp_path / "run", tmp_path / "own.csv", tmp_path / "other.csv"
    shutil.copytree(run_folder / "run", run)
    lines = [line.split("\t") for line in (run_folder / "users.tsv").read_text().splitlines()]
    rows = [
        f"{user},{number},{item},{step}"
        for number, (user, items) in enumerate(lines)
        for step, item in enumerate(items.split())
    ]
    own.write_text("\n".join(["buyer,client,item,timestamp", *rows]) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"users": str(own), "columns": {"user": "buyer"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    events = [f"{user},b{(3 + step):02},{step}\n" for user in ("new", lines[0][0]) for step in range(6)]
    other.write_text("client,product,timestamp\n" + "".join(events))
    found = evaluate(
        capsys, run, "--users", str(other), "--user-column", "client", "--item-column", "product"
    )
    assert found["users"] == 1, "the other one was trained on"


def test_a_column_that_is_named_leaves_the_run_s_others_as_they_were(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's users in a table whose times the run took from `seen`, which `--time-column` replaces."""
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    rows = ["who,what,seen,later"]
    for line in (run_folder / "users.tsv").read_text().splitlines():
        user, items = line.split("\t")
        rows += [f"{user},{item},{99 - step},{step}" for step, item in enumerate(items.split())]
    (tmp_path / "users.csv").write_text("\n".join(rows) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {
        "users": str(tmp_path / "users.csv"),
        "columns": {"user": "who", "item": "what", "time": "seen"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    own = evaluate(capsys, run_folder / "run")
    assert evaluate(capsys, run)["metrics"] != own["metrics"], "the histories are read backwards"
    assert evaluate(capsys, run, "--time-column", "later")["metrics"] == own["metrics"]
    exported = [str(tmp_path / name) for name in ("items.npy", "users.npy")]
    assert main(["export", str(run), "--embeddings", *exported, "--time-column", "later"]) == 0
    expected = [str(tmp_path / name) for name in ("items0.npy", "users0.npy")]
    assert main(["export", str(run_folder / "run"), "--embeddings", *expected]) == 0
    assert np.array_equal(np.load(exported[1]), np.load(expected[1]))


def test_lists_and_baselines_share_table_and_protocol(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder / "run"
    plain = evaluate(capsys, run, "--k", "2", "5")
    result = evaluate(capsys, run, "--k", "2", "5", "--lists", "--baselines")
    baselines = result.pop("baselines")
    assert set(baselines) == {"popularity", "last item's neighbours"}
    assert {other["protocol"] for other in baselines.values()} == {result["protocol"]}
    assert {name: result[name] for name in plain} == plain, "what is asked for in addition changes nothing"
    assert set(result["lists"]) == {
        f"{name}@{k}" for name in ("coverage", "novelty", "diversity") for k in (2, 5)
    }
    assert main(["evaluate", "--run", str(run), "--k", "2", "5", "--lists", "--baselines"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("recommender"))
    assert lines[head - 1] == result["protocol"]
    for words in ("HR@k %", "NDCG@k %", "MRR %", "coverage %", "novelty, bits", "diversity"):
        assert words in lines[head]
    own = [line for line in lines[head + 1 :] if line.startswith("this run")]
    assert f"{100 * result['metrics']['hr@5']:.2f}" in own[1]
    others = [line for line in lines if line.startswith("popularity")]
    # Items of one popularity tie: also how it does where they stand in random order, a row a cut-off.
    assert len(others) == len(own) + 2 and sum("ties in random order" in line for line in others) == 2
    assert sum(line.startswith("last item's neighbours") for line in lines) == len(own)


def test_sasrec_is_trained_when_it_is_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder / "run"
    wanted = ("--k", "1", "5", "--baselines", "sasrec", "popularity", "--sasrec-epochs", "40")
    assert main(["evaluate", "--run", str(run), "--json", *wanted, "--sasrec-seed", "0"]) == 0
    shown = capsys.readouterr()
    assert "trains vectors of 16 numbers for 24 items on the run's 30 training sequences" in shown.err
    result = json.loads(shown.out)
    assert list(result["baselines"]) == ["SASRec by ids", "popularity"]
    sasrec, popularity = result["baselines"].values()
    assert sasrec["metrics"]["hr@5"] > 0.9 > 0.5 > popularity["metrics"]["hr@5"], "the next item is certain"
    trained = sasrec.pop("trained")
    assert trained["most"] == 40 and trained["epochs"] <= 40 and trained["settings"]["seed"] == 0
    assert sasrec["protocol"] == popularity["protocol"] == result["protocol"]
    # Another protocol, and users whom the run never saw, are what it is judged on, not what it is chosen by.
    assert main(["evaluate", "--run", str(run), *wanted, "--filter-history", "none"]) == 0
    printed = capsys.readouterr().out.splitlines()
    own = [line for line in printed if line.startswith("SASRec by ids")]
    assert len(own) == 3, "two cut-offs, and how it was trained"
    assert "parameters, best epoch" in own[2] and "learning_rate 0.01" in own[2] and "seed 0" in own[2]
    assert f"best epoch {trained['best_epoch']} of {trained['epochs']}" in own[2]


def test_sasrec_for_other_users_is_trained_on_the_run_s(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others.tsv"
    others.write_text(
        "".join(f"new{i}\t" + " ".join(f"b{i + j:02}" for j in range(6)) + "\n" for i in range(9))
    )
    wanted = ("--k", "1", "--baselines", "sasrec", "--sasrec-epochs", "40")
    found = evaluate(capsys, run_folder / "run", *wanted, "--users", str(others))
    sasrec = found["baselines"]["SASRec by ids"]
    assert sasrec["users"] == 9 and sasrec["metrics"]["hr@1"] > 0.8
    own = evaluate(capsys, run_folder / "run", *wanted)["baselines"]["SASRec by ids"]
    assert list(own["trained"]["tried"]) == ["0.01", str(0.01 / 3)]
    rates = ("--sasrec-learning-rates", "0.02", "0.01")
    other = evaluate(capsys, run_folder / "run", *wanted, *rates)["baselines"]["SASRec by ids"]
    assert list(other["trained"]["tried"]) == ["0.02", "0.01"]
    assert other["trained"]["tried"]["0.01"] == own["trained"]["tried"]["0.01"]
    for name in ("best_epoch", "validation"):
        assert sasrec["trained"][name] == own["trained"][name], "the same training"


def test_wrong_baselines_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--run", str(run_folder / "run"), "--baselines"]
    with pytest.raises(SystemExit):
        main([*command, "popularity", "sasrek"])
    assert "did you mean 'sasrec'?" in capsys.readouterr().err
    for option in ("--sasrec-epochs", "--sasrec-seed", "--sasrec-learning-rates"):
        assert main([*command, "popularity", option, "3"]) == 2
        assert f"{option}: goes with --baselines sasrec" in capsys.readouterr().err
    assert main([*command, "sasrec", "--sasrec-epochs", "0"]) == 2
    assert "epochs: expected an integer of at least 1, got 0" in capsys.readouterr().err
