"""The `cache` commands, through their parser."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crossan_fast.cache import HiddenStateCache, write_cache
from crossan_fast.cache.build.passes import ArrayPass
from crossan_fast.cli import cache as command


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["cache", *map(str, arguments)]))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "items.tsv").write_text("lamp\tA lamp\nchair\tA chair\nbed\tA bed\n")
    states = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    states[1, 0, 0] = np.nan
    np.save(tmp_path / "states.npy", states)
    np.save(tmp_path / "more.npy", np.random.default_rng(1).normal(size=(4, 2, 4)).astype(np.float32))
    return tmp_path


def build(files: Path, *more: object) -> int:
    modality = f"audio={files / 'states.npy'}:precomputed"
    out = files / "c"
    return run(
        "build", "--items", files / "items.tsv", "--out", out, "--modality", modality, "--no-progress", *more
    )


def test_build_info_verify_convert(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(files, "--dtype", "fp32") == 0
    output = capsys.readouterr()
    assert "3 items added, 0 unchanged; 3 items in all" in output.out
    assert (
        f"of 3 items 1 lack 'audio'; 1 have no modality at all: no run uses them; see {files / 'c'}"
        in output.err
    )
    assert build(files) == 0
    assert "0 items added, 3 unchanged; 3 items in all" in capsys.readouterr().out
    assert run("info", files / "c") == 0
    described = capsys.readouterr().out
    assert "3 items, fp32, 0.0 MB of states" in described
    assert "audio: 2 levels of width 4, present for 2 of 3 items" in described
    assert "on cpu it would be resident: 0.00 GB of states" in described
    assert "precomputed: " in described and "report.tsv" in described
    assert run("verify", files / "c", "--no-progress") == 0
    assert "sound" in capsys.readouterr().out
    assert run("convert", files / "c", "--out", files / "q", "--dtype", "int8", "--no-progress") == 0
    assert "int8" in (printed := capsys.readouterr().out) and "audio: relative error" in printed
    assert HiddenStateCache.open(files / "q").dtype == torch.int8


def test_build_from_states_whose_rows_a_file_names(files: Path) -> None:
    (files / "ids.txt").write_text("bed\nother\nlamp\nchair\n")
    modality = f"audio={files / 'more.npy'}:precomputed:ids={files / 'ids.txt'}"
    words = ("build", "--items", files / "items.tsv", "--out", files / "c", "--modality", modality)
    assert run(*words, "--dtype", "fp32", "--no-progress") == 0
    rows = HiddenStateCache.open(files / "c").gather(torch.tensor([1, 2, 3]))["audio"]
    assert np.array_equal(rows.numpy(), np.load(files / "more.npy")[[2, 3, 0]])


def test_info_says_what_all_items_have_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = torch.randn(2001, 2, 8)
    states[:, 1] += 3 * torch.eye(8)[0] * 8**0.5  # 9 of 10 parts of this level's energy, 0 of the other's
    states[0] = 0
    write_cache(
        tmp_path / "c",
        {"one": states, "two": torch.nn.functional.pad(torch.randn(2000, 1, 8), (0, 0, 0, 0, 1, 0))},
    )
    assert run("info", tmp_path / "c") == 0
    described = capsys.readouterr().out
    assert described.count("in common") == 1 and described.index(
        "in common: 45% of the energy"
    ) < described.index("two:")
    assert run("convert", tmp_path / "c", "--out", tmp_path / "z", "--centre", "one", "--no-progress") == 0
    assert run("info", tmp_path / "z") == 0
    assert "in common" not in capsys.readouterr().out.split("one: 2 levels")[1]


def test_build_says_it_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "items.tsv").write_text("".join(f"item{k}\tAn item\n" for k in range(40)))
    states = 3 + np.random.default_rng(0).normal(size=(40, 2, 4))
    np.save(files / "states.npy", states.astype(np.float32))
    build(files, "--dtype", "fp32")
    assert re.search(r"audio: in common: [89]\d% of the energy", capsys.readouterr().out)


def test_damaged_states_do_not_fail_what_has_nothing_to_do_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(tmp_path / "c", {"one": torch.nn.functional.pad(torch.randn(40, 1, 8), (0, 0, 0, 0, 1, 0))})
    path = tmp_path / "c" / "one.states.bin"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    assert run("info", tmp_path / "c") == 0
    assert re.search(r"one: 1 levels.*\n *not looked at: .*one\.states\.bin", capsys.readouterr().out)


def test_convert_into_a_basis(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(files, "--dtype", "fp32")
    convert = ("convert", files / "c", "--no-progress", "--out")
    capsys.readouterr()
    assert run(*convert, files / "b", "--basis", "3", "--dtype", "fp16") == 0
    printed = capsys.readouterr().out
    assert "fp32 0.0 MB -> fp16 0.0 MB" in printed and "audio: relative error" in printed
    (shares,) = re.findall(
        r"audio: 3 of 4 dimensions hold (\S+)% of the energy; levels (\S+)% (\S+)%", printed
    )
    held = HiddenStateCache.open(files / "b").sources["audio"]["energy"]
    assert [float(share) for share in shares] == pytest.approx(
        [50 * sum(held), 100 * held[0], 100 * held[1]], abs=0.05
    )
    assert run("info", files / "b") == 0
    described = capsys.readouterr().out
    assert "audio: 2 levels of width 3 (coordinates in a basis, of width 4), present for 2" in described
    assert f"energy: {held}" in described
    assert run("verify", files / "b", "--no-progress") == 0
    assert run(*convert, files / "n", "--energy", "audio=0.3") == 0
    assert "audio: 1 of 4 dimensions hold" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--basis: expected .*, got audio=2 audio=3"):
        run(*convert, files / "x", "--basis", "audio=2", "--basis", "audio=3")
    with pytest.raises(SystemExit):
        run(*convert, files / "x", "--energy", "0.5", "--basis", "2")
    assert "--basis: not allowed with argument --energy" in capsys.readouterr().err
    for given in (["x"], ["2.5"], ["audio=2", "3"], ["audio=2", "audio=3"], ["2", "3"], ["audio="]):
        with pytest.raises(
            ValueError, match=r"--basis: expected a whole number, or NAME=number once for each, got"
        ):
            run(*convert, files / "x", "--basis", *given)
    with pytest.raises(
        ValueError, match=r"--energy: expected a number, or NAME=number once for each, got many"
    ):
        run(*convert, files / "x", "--energy", "many")
    with pytest.raises(
        ValueError, match="basis: modality 'audio': expected a number of dimensions from 1 to 3"
    ):
        run(*convert, files / "x", "--basis", "audio=4")
    assert not (files / "x").exists()


def test_convert_prints_what_a_run_loses_in_a_basis(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {path.name for path in run_folder.iterdir()}
    before = json.loads((run_folder / "run" / "results.json").read_text())
    arguments = ("--run", run_folder / "run", "--no-progress")
    costs = []
    for k in (7, 1):
        out = run_folder / f"basis{k}"
        assert run("convert", run_folder / "cache", "--out", out, "--basis", k, *arguments) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if "test: HR@10" in line]
        old, new = (float(share) for share in re.findall(r"([\d.]+)%", line)[:2])
        assert old == pytest.approx(100 * before["test"]["metrics"]["hr@10"], abs=0.005)
        costs.append(old - new)
        assert "one trained on the new cache may lose less" in printed
    assert costs[1] > costs[0]  # random states need all their directions
    shrunk = run_folder / "basis7"
    refused = (
        "modality 'text': expected states as their encoder gave them as in the run's cache, got states in"
    )
    with pytest.raises(ValueError, match=refused):
        run("convert", shrunk, "--out", run_folder / "basis-int8", "--dtype", "int8", *arguments)
    # The states made as wide again are gone.
    new = {path.name for path in run_folder.iterdir()} - there
    assert new == {"basis7", "basis1", "basis-int8"}


def test_convert_prints_what_a_run_loses(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run_folder / "run" / "results.json").read_text())
    arguments = ("--out", run_folder / "fp8", "--dtype", "fp8", "--no-progress", "--run", run_folder / "run")
    assert run("convert", run_folder / "cache", *arguments) == 0
    printed = capsys.readouterr().out
    for split in ("validation", "test"):
        (line,) = [line for line in printed.splitlines() if f"{split}: HR@10" in line]
        old, new = (float(share) for share in re.findall(r"([\d.]+)%", line)[:2])
        assert old == pytest.approx(100 * before[split]["metrics"]["hr@10"], abs=0.005)
        assert new == pytest.approx(old, abs=5) and "relative" in line


def test_more_items_are_appended(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(files)
    (files / "items.tsv").write_text("rug\tA rug\nlamp\tA lamp\nchair\tA chair\nsofa\tA sofa\n")
    modality = f"audio={files / 'more.npy'}:precomputed"
    arguments = [
        "--items",
        files / "items.tsv",
        "--out",
        files / "c",
        "--modality",
        modality,
        "--no-progress",
    ]
    assert run("build", *arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "2 items added, 0 unchanged; re-encoded: 2 audio; not in the items file, but kept: 1; 5 items in all"
    ) in printed
    cache = HiddenStateCache.open(files / "c", verify=True)
    assert list(cache.item_names) == ["", "lamp", "chair", "bed", "rug", "sofa"]
    expected = torch.from_numpy(np.load(files / "more.npy")).bfloat16()
    assert torch.equal(cache.gather(cache.rows_of(["rug", "lamp", "chair", "sofa"]))["audio"], expected)


def test_items_are_encoded_again_where_asked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = np.load(files / "more.npy")[:3]
    write_cache(
        files / "c",
        {"audio": torch.from_numpy(np.pad(states, ((1, 0), (0, 0), (0, 0))))},
        item_names=["lamp", "chair", "bed"],
        sources={"audio": {"layers": [0, 1]}},
    )
    np.save(files / "states.npy", states + 1)
    assert build(files) == 0
    printed = capsys.readouterr().out
    assert "0 items added, 3 unchanged;" in printed
    assert "of 3 items it is not known what their rows were made from" in printed
    assert "--re-encode all" in printed
    assert build(files, "--re-encode", "lamp", "bed") == 0
    assert "0 items added, 1 unchanged; re-encoded: 2 audio;" in capsys.readouterr().out
    now = HiddenStateCache.open(files / "c", verify=True).gather(torch.tensor([1, 2, 3]))["audio"].numpy()
    assert np.array_equal(now, states + np.array([1, 0, 1], np.float32)[:, None, None])
    assert build(files, "--re-encode", "all") == 0
    assert "re-encoded: 3 audio;" in (printed := capsys.readouterr().out) and "not known" not in printed
    with pytest.raises(KeyError, match="no item 'lamb' in the items file; did you mean 'lamp'"):
        build(files, "--re-encode", "lamb")


def test_strict_raises(files: Path) -> None:
    with pytest.raises(
        ValueError, match="item 'chair': modality 'audio': NaN or inf in the precomputed states"
    ):
        build(files, "--strict")


def test_a_stopped_build_says_how_to_go_on(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: ArrayPass, inputs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ArrayPass, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):  # which every command ends by in one way
            build(files)
    assert f"stopped; the same command goes on with {files / 'c'} where it was" in capsys.readouterr().err
    assert build(files) == 0


def test_verify_fails_on_a_flipped_byte(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(files)
    path = files / "c" / "audio.states.bin"
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    assert run("verify", files / "c", "--no-progress") == 1
    assert (
        "audio.states.bin: bytes 0 to 63 (rows 0 to 3) differ from what was written"
        in capsys.readouterr().err
    )


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("build", "--help")
    assert stopped.value.code == 0
    assert "crossan-fast cache build --items items.tsv" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
