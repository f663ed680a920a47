"""Which of a wheel's libraries is taken, and what one for another CPU says."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from crossan_fast import _build, _levels, cli
from crossan_fast._library import BuildInfo

V3, V4 = (set(_levels.LEVELS[f"x86-64-v{level}"]) for level in (3, 4))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's folder with a library for each level, which are no libraries, but whole."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_build, "AHEAD_OF_TIME", tmp_path)
    for march in _levels.LEVELS:
        folder = tmp_path / f"cpu-{march}"
        folder.mkdir()
        content = march.encode()
        (folder / "cpu.so").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        needs = _levels.needed(march)
        assert needs is not None
        flags = ["-O3", f"-march={march}"]
        info = BuildInfo(
            "cpu", "cpu.so", torch.__version__, "g++", needs, flags, 1.0, len(content), digest, True
        )
        (folder / "stamp.json").write_text(json.dumps(asdict(info)))
    return tmp_path


def test_the_best_that_the_cpu_can_run_is_taken(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert V3 < V4
    for have, march in (
        (V4 | {"amx_bf16"}, "x86-64-v4"),
        (V4 - {"avx512vl"}, "x86-64-v3"),
        (V3, "x86-64-v3"),
    ):
        monkeypatch.setattr(_build, "cpu_flags", lambda have=have: sorted(have))
        info = _build.ahead_of_time("cpu")
        assert info is not None and _build.misfit("cpu") is None
        assert Path(info.library).parent == shipped / f"cpu-{march}" and _build.cpu_march() == march
    (shipped / "cpu-x86-64-v4" / "cpu.so").write_bytes(b"cut short")
    monkeypatch.setattr(_build, "cpu_flags", lambda: sorted(V4))
    assert _build.cpu_march() == "x86-64-v3", "a damaged one is passed over"


def test_a_cpu_of_neither_level_is_told_what_it_lacks(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "cpu_flags", lambda: sorted(V3 - {"fma", "avx2"}))
    assert _build.misfit("cpu") == "this CPU lacks avx2, fma"
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert _build.misfit("cpu") is not None and "this is 1.0" in str(_build.misfit("cpu"))


def test_a_library_for_a_level_says_what_that_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSAN_FAST_MARCH", "x86-64-v3")
    monkeypatch.setattr(_build, "instruction_set", lambda: "x86_64 avx512f amx_bf16")
    recipe = _build._recipe(_build.PARTS["cpu"])
    assert set(recipe.instruction_set.split()) == {"x86_64", *V3}
    assert recipe.seconds > 0
    monkeypatch.setenv("CROSSAN_FAST_MARCH", "native")
    assert _build._recipe(_build.PARTS["cpu"]).instruction_set == "x86_64 avx512f amx_bf16"


def test_build_says_where_and_refuses_other_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = BuildInfo("cpu", "/there/cpu.so", "2", "g++", "x86_64", [], 1.0, 1, "")
    there: list[BuildInfo | None] = [None, info]
    monkeypatch.setattr(_build, "built", lambda name: there.pop(0))
    monkeypatch.setattr(_build, "load", lambda name: info)
    assert cli.main(["build"]) == 0 and cli.main(["build", "cpu", "--json"]) == 0
    assert capsys.readouterr().out == 'cpu: built: /there/cpu.so\n{\n  "cpu": "/there/cpu.so"\n}\n'
    assert cli.main(["build", "gpu"]) == 2
    assert "PART: expected some of ['cpu', 'cuda'], got 'gpu'" in capsys.readouterr().err
