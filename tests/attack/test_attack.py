"""The bounded part of the attack; `python -m tests.attack` is the whole."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import hostile_calls
import hostile_files
import pytest
import soak
import torch
from compiled_ops import needs_cpp
from programs import HERE, faulty, run_python
from tally import Tally, write

from crossan_fast.ops._dispatch import OPS

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def survived(tally: Tally) -> bool:
    """Whether something was tried, and nothing lost."""
    assert not tally.lost, str(tally)
    return tally.tried > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp), "triton"])
def test_a_hostile_argument_is_served_or_named(backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter reads tensors of the CPU")
    count = 45 if backend == "triton" else 500  # 10^5 by the command
    assert survived(hostile_calls.attack(backend, 1, 0, count, lambda index: None))


def test_every_op_has_hostile_calls() -> None:
    assert set(hostile_calls._DRAWS) == set(OPS)


@pytest.mark.parametrize("form", hostile_files.FORMATS)
def test_a_hostile_file_is_read_as_it_was_or_named(form: str, tmp_path: Path) -> None:
    assert survived(hostile_files.attack(form, tmp_path, 1, 0, 150, lambda index: None))


@pytest.mark.sweep(1)
@needs_cc
@pytest.mark.parametrize("kind", ["EIO", "SHORT", "SIGKILL"])
def test_any_failing_call_of_a_save_leaves_the_old_model_or_the_new(kind: str) -> None:
    assert survived(faulty("save", kind))


@needs_cpp
@pytest.mark.parametrize("methods", [(), pytest.param(("spawn", "forkserver"), marks=pytest.mark.long)])
def test_ops_and_rows_have_the_same_bits_from_anywhere(methods: tuple[str, ...]) -> None:
    """In a process of its own: it forks."""
    path = [str(HERE), str(HERE.parent / "helpers")]
    script = f"import sys; sys.path[:0] = {path!r}; import threads; "
    script += f"print(threads.attack(3, {methods!r}).to_json())"
    done = run_python("-c", script)
    assert survived(Tally.from_json(done.stdout.splitlines()[-1]))


@pytest.mark.long
def test_a_process_that_grows_is_found() -> None:
    files: list[int] = []
    assert soak.watched("nothing", 20, lambda index: None).survived == 20
    told: list[int] = []
    grown = soak.watched(
        "files",
        20,
        lambda index: files.append(os.open(__file__, os.O_RDONLY)),
        lambda tally: told.append(tally.tried),
    )
    assert told == list(range(2, 21, 2))
    assert grown.lost["grew"] == 9 and "after 4" in grown.examples["grew"]
    for file in files:
        os.close(file)


def test_the_table_has_a_row_an_attack(tmp_path: Path) -> None:
    tally = Tally("files, config")
    for how in (None, "crashed", None):
        tally.add(how, "case 2")
    assert "2 of 3 survived" in str(tally) and "case 2" in str(tally)
    write(tmp_path / "table.csv", [Tally.from_json(tally.to_json())])
    with (tmp_path / "table.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["files, config", "3", "2", "1", "1 crashed"]
    write(tmp_path / "table.csv", [Tally("saves", 1)])
    write(tmp_path / "table.csv", [Tally("files, config", 4)])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [["files, config", "4", "4", "0", ""], ["saves", "1", "1", "0", ""]]
