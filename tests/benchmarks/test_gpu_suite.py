"""gpu_suite.sh with an interpreter that only writes down what it is asked: cases and tests that exist."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.__main__ import _names, _parser

ROOT = Path(__file__).parents[2]
CALLS = ("smoke", "bf16", "fp32", "profiles")
STUB = """#!/usr/bin/env bash
printf '%s\\x1f' "$@" >> "$ASKED"; printf '\\n' >> "$ASKED"
case "$*" in
  *default_path*) echo stub.csv ;;
  *"$FAILING"*) exit "${STATUS:-3}" ;;
esac
"""


def suite(tmp_path: Path, *calls: str, device: str = "cuda", failing: str = "nothing fails"):
    """The finished process, and the arguments of every command."""
    stub, asked, tools = tmp_path / "python", tmp_path / "asked", tmp_path / "tools"
    stub.write_text(STUB)
    stub.chmod(0o755)
    tools.mkdir()
    for tool in ("ncu", "compute-sanitizer"):  # run what stands behind their options
        (tools / tool).write_text(
            f'#!/usr/bin/env bash\nwhile [ "$1" != "{stub}" ]; do shift; done\nexec "$@"\n'
        )
        (tools / tool).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "ASKED": str(asked),
        "FAILING": failing,
        "OUT": str(tmp_path / "out"),
        "CROSSAN_FAST_SUITE_PYTHON": str(stub),
        "CROSSAN_FAST_SUITE_DEVICE": device,
    }
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", *calls],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    commands = [line.split("\x1f")[:-1] for line in asked.read_text().splitlines() if line.endswith("\x1f")]
    return done, commands


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_asks_for_what_there_is(tmp_path, call, device):
    done, commands = suite(tmp_path, call, device=device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
    assert (tmp_path / "out" / f"gpu_suite.{call}.log").read_text() == done.stdout
    measured = [command[2:] for command in commands if command[:2] == ["-m", "benchmarks"]]
    for arguments in measured:
        options = _parser().parse_args(arguments)
        if arguments[0] in ("run", "check"):
            cases = registry.select(options.pattern, options.tag, options.device)
            assert cases, arguments
            assert options.only is None or _names(options.only, registry.IMPLEMENTATIONS, "--only")
            assert options.dtypes is None or _names(options.dtypes, tuple(registry.DTYPES), "--dtypes")
    reported = [Path(arguments[-1]).name for arguments in measured if arguments[0] == "report"]
    asked = {"smoke": [], "profiles": ["tuned.csv"]}  # a call that measures nothing has no table
    assert reported == asked.get(call, ["stub.csv"])
    assert len(measured) - len(reported) >= 2
    paths = [a for command in commands if "pytest" in command for a in command if a.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths)
    assert bool(paths) == (call == "smoke" or (call == "profiles" and device == "cuda"))


def test_what_fails_stops_nothing_else(tmp_path):
    done, commands = suite(tmp_path, "bf16", failing="side_network/N=704")
    assert done.returncode == 1 and "SOMETHING FAILED" in done.stdout
    assert any("full_loss/rows=640," in command for command in commands)


def test_what_is_cut_off_is_named_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("STATUS", "124")  # as `timeout` ends
    done, _ = suite(tmp_path, "bf16", failing="full_loss/rows=640,")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2] == "== not to its end: full softmax"


def test_without_a_name_it_is_smoke_then_bf16(tmp_path):
    done, _ = suite(tmp_path)
    started = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("=== ")]
    assert started == ["smoke", "bf16"]


def test_an_unknown_call_is_named():
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", "smok"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "got smok" in done.stderr
