"""What every command says when it cannot go on: one line, a status, no traceback; and signals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crossan_fast import cli
from crossan_fast.cli import FAULT, main
from crossan_fast.cli import train as command

FORESEEN = [
    (OSError(errno.ENOSPC, "No space left on device"), "make room and run it again"),
    (MemoryError(), "not enough memory (MemoryError)"),
    (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode"),
    (KeyError("name: no item 'b0'"), "name: no item 'b0'"),
    (TypeError("evaluation.k: expected an integer, got 'x'"), "evaluation.k: expected an integer"),
]
FAULTS = [
    KeyError("cpu"),
    IndexError("list index out of range"),
    TypeError("unsupported operand type(s) for +: 'int' and 'NoneType'"),
    TypeError("run() missing 1 required positional argument: 'x'"),
    AttributeError("'NoneType' object has no attribute 'shape'"),
    AssertionError(),
    OverflowError("int too big to convert"),
    ZeroDivisionError("division by zero"),
    Exception("SafetensorError: invalid header"),
]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(command, "run", run)
    return main(["train", "config.yaml"])


@pytest.mark.parametrize(("error", "message"), FORESEEN, ids=lambda value: type(value).__name__)
def test_an_error_of_the_input_or_the_machine_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("crossan-fast train: error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_an_error_that_nobody_foresaw_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error, monkeypatch) == FAULT == 70
    said = capsys.readouterr().err
    assert said.startswith(f"crossan-fast train: this is a bug of crossan-fast: {type(error).__name__}")
    assert "crossan-fast --debug" in said and said.count("\n") == 1


def test_debug_shows_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", lambda args: [][0])
    with pytest.raises(IndexError):
        main(["--debug", "train", "config.yaml"])


def test_a_command_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "crossan_fast.cli.train", None)
    assert main(["train", "config.yaml"]) == 2
    assert capsys.readouterr().err.startswith("crossan-fast train: error: import of crossan_fast.cli.train")


@pytest.mark.parametrize(
    "words",
    [
        ["recommend", "--run", "RUN", "--history", "b00", "--k", "9" * 30],
        ["evaluate", "--run", "RUN", "--k", "9" * 30],
        ["train", "CONFIG", "run=OUT", "batch_size=" + "9" * 30, "epochs=1"],
        ["train", "CONFIG", "run=OUT", "model.embedding_dim=" + "9" * 30],
        ["train", "CONFIG", "run=OUT", "model.window=" + "9" * 12],
        ["train", "CONFIG", "run=OUT", "evaluation.batch_size=" + "9" * 30, "epochs=1"],
        ["train", "CONFIG", "run=OUT", "optimizer.warmup_steps=" + "9" * 30, "epochs=1"],
        ["train", "CONFIG", "run=OUT", "min_items=" + "9" * 30],
        ["train", "CONFIG", "--profile", "9" * 30, "run=OUT", "epochs=0"],
        ["train", "CONFIG", "run=OUT", "users=\0"],
        ["cache", "info", "\0"],
        ["cache", "build", "--items", "/dev/null", "--out", "OUT"],
    ],
    ids=lambda words: " ".join(words)[:50].replace("\0", "0"),
)
def test_hostile_arguments_end_in_a_line(
    run_folder: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CONFIG": str(run_folder / "config.yaml"), "RUN": str(run_folder / "run")}
    given = [places.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in words]
    assert main([*given, "--quiet"] if words[0] == "train" else given) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


# -- where output and paths are ASCII, and signals ---------------------------------------------------------


def program(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "crossan_fast", *words], env=settings, capture_output=True)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.slow
def test_names_and_paths_in_unicode_need_no_unicode_terminal(run_folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    users = tmp_path / "użytkownicy.tsv"
    users.write_bytes((run_folder / "users.tsv").read_bytes())
    items = tmp_path / "items.tsv"
    items.write_text((run_folder / "items.tsv").read_text().replace("Title", "Τίτλος"), encoding="utf-8")
    config |= {"users": str(users), "items": str(items), "epochs": 1, "run": str(tmp_path / "βόλτα")}
    (tmp_path / "κόσμος.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    done = program("train", str(tmp_path / "κόσμος.yaml"), "--quiet", **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "βόλτα" / "results.json").read_text())["epochs"] == 1
    told = program("recommend", "--run", str(tmp_path / "βόλτα"), "--history", "b00", **ASCII)
    assert told.returncode == 0 and rb"\u03a4\u03af\u03c4\u03bb\u03bf\u03c2 b00" in told.stdout


@pytest.mark.sweep(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_last_epoch(run_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    words = [str(run_folder / "config.yaml"), f"run={run}", "patience=null", "--quiet"]
    with subprocess.Popen(
        [sys.executable, "-m", "crossan_fast", "train", *words, "epochs=100000"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert said == f"crossan-fast train: {'terminated' if number == signal.SIGTERM else 'interrupted'}\n"
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
    epochs = len((run / "log.jsonl").read_text().splitlines())
    assert main(["train", *words, f"epochs={epochs}", "--resume"]) in (0, 3)


def test_one_of_several_processes_leaves_sigterm_to_their_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with cli._sigterm_as_interrupt():
        assert signal.getsignal(signal.SIGTERM) is not before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with cli._sigterm_as_interrupt():
        assert signal.getsignal(signal.SIGTERM) is before
