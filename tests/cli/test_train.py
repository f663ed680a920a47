"""`crossan-fast train`, and what every command shares: clean errors and lazy imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_ops import needs_cpp

import crossan_fast
from crossan_fast import cli
from crossan_fast.cli import COMMANDS, main
from crossan_fast.cli.train import refuse_repeated
from crossan_fast.ops import _registration
from crossan_fast.training import load_config

PACKAGE = Path(crossan_fast.__file__).parent


def test_train_prints_each_epoch_and_the_protocol(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", str(run_folder / "config.yaml"), f"run={out}", "patience=null"]
    assert main([*arguments, "epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert "30 users, 24 items" in printed
    assert "epoch 1/2: loss" in printed
    assert "validation HR@10" in printed
    assert "full ranking of 24 items, filter_history=all_except_target" in printed
    results = json.loads((out / "results.json").read_text())
    assert f"{100 * results['test']['metrics']['hr@10']:.2f}" in printed
    assert f"parameters to train: {results['parameters']:,}" in printed
    assert main([*arguments, "epochs=3", "--resume"]) == 0
    assert "goes on behind epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed=1", "epochs=2", "seed=2"], "'seed=1' and 'seed=2'"),
        (["model.dropout=0.3", "model={embedding_dim: 16}"], "'model.dropout=0.3' and 'model={embedding"),
        (["model={dropout: 0.3}", "model.dropout=0.2"], "'model={dropout: 0.3}' and 'model.dropout=0.2'"),
        (["model={}", "model={}"], "'model={}' and 'model={}'"),
        (["columns.user=who", "--user-column", "name"], "'columns.user=who' and 'columns.user=\"name\"'"),
    ],
)
def test_an_override_that_undoes_another_is_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], named: str
) -> None:
    assert main(["train", str(run_folder / "config.yaml"), *overrides]) == 2
    assert f"override: expected each field once, got {named}" in capsys.readouterr().err


def test_overrides_of_different_fields_go_together(run_folder: Path) -> None:
    overrides = ["model={blocks: 1}", "model.dropout=0.2", "seed=3"]
    refuse_repeated(overrides)
    refuse_repeated(["model.drop=1", "model.dropout=0.2"])  # a name that begins as another
    config = load_config(run_folder / "config.yaml", overrides)
    assert (config.model["blocks"], config.model["dropout"], config.seed) == (1, 0.2, 3)


def id_road() -> list[str]:
    """The files that ids cross by CONTRIBUTING.md, in its order."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    road = text.partition("An **id**")[2].partition("A **cached row**")[0]
    return re.findall(r"^\d+\. `([\w/.]+)`", road, re.MULTILINE)


@needs_cpp
def test_ids_take_the_road_that_the_contributors_page_shows(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who calls whom, from the command to the kernel: no file between that the page does not name."""
    road, stacks = id_road(), []
    whole = _registration.host_function

    def host_function(op: str, part: str, backend: str):
        function = whole(op, part, backend)
        if (op, part) == ("side_network", "forward"):
            assert function is torch.ops.crossan_fast_cpp.side_network.default  # none between the two
            frame, stack = sys._getframe(1), []
            while frame is not None:
                stack.append(frame.f_code.co_filename)
                frame = frame.f_back
            stacks.append(stack[::-1])
        return function

    monkeypatch.setattr(_registration, "host_function", host_function)
    options = [f"run={tmp_path / 'run'}", "epochs=1", "backend=cpp", "device=cpu"]
    assert main(["train", str(run_folder / "config.yaml"), *options]) == 0
    crossed = [path for path in map(Path, stacks[0]) if PACKAGE in path.parents]
    named = [f"crossan_fast/{path.relative_to(PACKAGE)}" for path in crossed]
    # Each at the last place it stands in: the check of devices, too, is the registration's.
    last = list(dict.fromkeys(reversed(named)))[::-1]
    steps = [path for path in last if not path.startswith("crossan_fast/cli/")]
    assert len(road) <= 11
    assert steps == [path for path in road if path in steps] and "crossan_fast/model.py" in steps
    assert steps[-1] == "crossan_fast/ops/_registration.py" == road[-2]


@pytest.mark.parametrize(
    "line",
    [
        "train config.yaml --quiet seed=1",
        "train config.yaml --resume epochs=7 --quiet model.dropout=0.2 seed=1",
        "train --quiet seed=1 config.yaml",
        "train seed=1 config.yaml --profile epochs=3",
        "train config.yaml --profile 5 seed=1",
        "train ./a=1/config.yaml seed=1 -- epochs=2",
        "--debug train config.yaml --quiet users=u=1.tsv",
        "train config.yaml",
    ],
)
def test_overrides_stand_anywhere(line: str) -> None:
    words = line.split()
    args = cli._parser(words).parse_args(words)
    assert args.overrides == [word for word in words if "=" in word and word[0] != "."]
    assert Path(args.config).name == "config.yaml"
    assert args.quiet == ("--quiet" in words)
    assert args.profile == (None if "--profile" not in words else 5 if "5" in words else 20)


def test_what_is_no_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("train c.yaml --quite seed=1", "train c.yaml --quiet seed", "evaluate --run r seed=1"):
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        assert stopped.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "train: error: config: no file absent.yaml"),
        (["train", "CONFIG", "epoch=2"], "unknown config key 'epoch'; did you mean 'epochs'?"),
        (["train", "CONFIG", "users=absent.tsv"], "absent.tsv"),
        (["train", "CONFIG"], "holds a run; pass --resume"),
        (["train", "CONFIG", "backend=cudaa"], "backend: expected one of"),
        (["evaluate", "--run", "absent"], "evaluate: error: run: expected config.yaml in absent"),
        (["recommend", "--run", "RUN", "--history", "b0"], "recommend: error: name: no item 'b0'"),
        (["recommend", "--run", "RUN", "--history", "b00", "--k", "0"], "k: expected"),
        (["evaluate", "--run", "RUN", "--k", "24"], "k: expected 1 to 23"),
        (["evaluate", "--run", "RUN", "--device", "tpu9"], "device: 'tpu9' cannot be used"),
    ],
)
def test_an_error_is_one_line_and_code_2(
    run_folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CONFIG": str(run_folder / "config.yaml"), "RUN": str(run_folder / "run")}
    assert main([places.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_where_an_error_came_from() -> None:
    with pytest.raises(FileNotFoundError, match="config: no file"):
        main(["--debug", "train", "absent.yaml"])


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_each_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"crossan-fast {name}" in capsys.readouterr().out


def test_the_help_of_train_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for field in ("cache=(required)", "optimizer.learning_rate=0.001", "model.dropout=0.1", "patience=5"):
        assert f"  {field}\n" in printed


def test_a_command_imports_no_other(tmp_path: Path) -> None:
    script = (
        "import sys; from crossan_fast.cli import main; code = main(['train', 'absent.yaml']);"
        "print(code, sorted(m for m in sys.modules if m.startswith('crossan_fast.cli.') and '._' not in m),"
        " 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 ['crossan_fast.cli.train'] False"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crossan_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("crossan-fast ")
