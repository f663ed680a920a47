"""`crossan-fast doctor` says what is picked, and every reason against the rest."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import results
from crossan_fast import _build, _library
from crossan_fast.cli import doctor, main
from crossan_fast.ops import _dispatch


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch):
    """Two planted backends on the CPU: one lacks an op, one is not importable."""
    orders = {"cpu": ("cpp", "triton", "eager"), "cuda": ("eager",)}
    monkeypatch.setattr(_dispatch, "_ORDER", {d: dict.fromkeys(o, "measured") for d, o in orders.items()})
    planted = {(op, "triton"): _dispatch.Implementation(print) for op in ("fusion", "deduplicate")}
    otherwise = {"cpp": "planted: no compiler", "triton": _dispatch.NO_KERNEL}
    monkeypatch.setattr(_dispatch, "_find", lambda *key: planted.get(key, otherwise[key[1]]))
    _dispatch._choose.cache_clear()
    yield
    _dispatch._choose.cache_clear()


def _tried() -> list[str]:
    """The ops that are not meant for torch's own kernels on the CPU."""
    return [op for op in _dispatch.OPS if (op, "cpu") not in _dispatch.EAGER_BY_DESIGN]


def section(printed: str, title: str) -> dict[str, str]:
    lines = printed.split(f"\n{title}\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return {line[2:18].strip(): line[19:] for line in lines}


def test_picks_and_reasons(backends: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    cpu = section(capsys.readouterr().out, "ops on cpu in fp32")
    for op in _dispatch.OPS:
        assert cpu[op].startswith("triton" if op in ("fusion", "deduplicate") else "eager")
    assert cpu["not cpp"] == "for any op: planted: no compiler"
    lacking = [op for op in _tried() if op not in ("fusion", "deduplicate")]
    assert cpu["not triton"] == f"for {', '.join(lacking)}: has no kernel for this op"


def test_a_forced_backend_that_can_not_serve(
    backends: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "cpp")
    assert main(["doctor", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert (
        "none: fusion: backend 'cpp' was asked for on cpu" in section(printed, "ops on cpu in bf16")["fusion"]
    )
    assert "CROSSAN_FAST_BACKEND=cpp takes the place of `auto`" in printed


def test_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert section(printed, "versions")["torch"] == torch.__version__
    machine = section(printed, "this machine")
    assert machine["torch threads"] == str(torch.get_num_threads())
    assert {"c++ compiler", "nvcc", "ninja"} <= machine.keys()


def test_json_has_every_section(backends: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["forced backend"] is None
    assert dict(printed["versions"])["torch"] == torch.__version__
    assert dict(printed["ops on cpu in fp32"])["fusion"].startswith("triton")


def test_calls_that_run_the_reference_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for device in ("cpu", "cuda"):
        lines = printed.split(f"\nops on {device} in fp32\n", 1)[1].split("\n\n", 1)[0].splitlines()
        after = {line[2:18].strip(): lines[i + 1].strip() for i, line in enumerate(lines[:-1])}
        for op in ("deduplicate", "side_network"):
            assert _dispatch.choose(op, device, torch.float32).backend == "eager" or after[op].startswith(
                f"but eager {_dispatch.REFERENCE_CALLS[op, device]}"
            )


def test_a_build_that_failed_or_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path))
    monkeypatch.setattr(_build, "AHEAD_OF_TIME", tmp_path / "wheel")
    monkeypatch.setattr(_dispatch, "_find", lambda op, backend: "planted")
    _dispatch._choose.cache_clear()
    failure = _build.build_folder(_build.PARTS["cpu"]) / "failure.txt"
    failure.parent.mkdir(parents=True)
    failure.write_text("planted")
    shipped = _build.BuildInfo("cpu", "x.so", "1.0", "c++", "x86_64", [], 1.0, 0, "", True)
    (tmp_path / "wheel" / "cpu").mkdir(parents=True)
    (tmp_path / "wheel" / "cpu" / "x.so").touch()
    (tmp_path / "wheel" / "cpu" / "stamp.json").write_text(json.dumps(asdict(shipped)))
    assert main(["doctor"]) == 0
    extension = section(capsys.readouterr().out, "compiled kernels")
    assert extension["cpu"] == f"did not compile, see {failure}; remove that file to try again"
    assert extension["cpu wheel"].endswith(f"passed over: built for torch 1.0, this is {torch.__version__}")
    _dispatch._choose.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine where nothing is built yet, and where to build is to leave a mark."""
    if reason := _build.PARTS["cpu"].missing():
        pytest.skip(f"cannot build: {reason}")

    def mark(recipe: _library.Recipe, folder: Path) -> None:
        (tmp_path / recipe.part).touch()
        raise _library.BuildError("planted")

    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path))
    monkeypatch.setattr(_build, "AHEAD_OF_TIME", tmp_path / "wheel")
    monkeypatch.setattr(_library, "obtain", mark)
    monkeypatch.setenv("MAX_JOBS", "2")
    _build._outcome.cache_clear()
    _dispatch._choose.cache_clear()
    yield tmp_path
    _build._outcome.cache_clear()
    _dispatch._choose.cache_clear()


def test_nothing_is_built_unless_asked(unbuilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert list(unbuilt.iterdir()) == []
    said = section(printed, "compiled kernels")["cpu"]
    assert said == "not built yet; built on first use (about 40 s), or by `crossan-fast build`"
    assert all(section(printed, "ops on cpu in fp32")[op].startswith("cpp (") for op in _tried())
    assert main(["doctor", "--build"]) == 0
    printed = capsys.readouterr().out
    assert (unbuilt / "cpu").exists()
    assert section(printed, "ops on cpu in fp32")["not cpp"] == "for any op: planted"


def test_how_long_a_build_takes_is_what_the_last_one_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CROSSAN_FAST_BUILD_DIR", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "1000")
    by_work = _build.expected_seconds("cpu")
    assert by_work == _build.PARTS["cpu"].work / len(_build.PARTS["cpu"].sources())
    for age, (part, seconds) in enumerate([("cpu", 70.0), ("cpu", 50.0), ("cuda", 10.0)]):
        stamp = tmp_path / f"{part}-{age}" / "stamp.json"
        stamp.parent.mkdir()
        info = _library.BuildInfo(part, "x.so", "2.0", "c++", "x86_64", [], seconds, 0, "")
        stamp.write_text(json.dumps(asdict(info)))
        os.utime(stamp, (age, age))
    (tmp_path / "cpu-cut").mkdir()
    (tmp_path / "cpu-cut" / "stamp.json").write_text("{")
    assert _build.expected_seconds("cpu") == 50.0


def test_triton_kernels_that_are_kept_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.cubin").touch()
    assert main(["doctor"]) == 0
    said = section(capsys.readouterr().out, "compiled kernels")["triton"]
    assert said.endswith(f"{tmp_path} keeps 2, of whatever program")


@pytest.mark.parametrize(
    "kind, march, reason",
    [
        (
            "AMD with AVX-512",
            "native",
            "measured ahead of eager on AMD with AVX-512, see benchmarks/results/amd-",
        ),
        ("Intel with AVX-512", "native", "on Intel with AVX-512, see benchmarks/results/intel-"),
        ("Intel with AVX2", "native", "not yet measured on Intel with AVX2, as this CPU is"),
        ("AMD with AVX2", "native", "measured ahead of eager on AMD with AVX2, see benchmarks/results/amd-"),
        ("Intel with AVX-512", "x86-64-v3", "not yet measured when compiled for x86-64-v3"),
    ],
)
def test_the_reason_names_rows_of_this_kind_of_cpu_or_says_that_there_are_none(
    monkeypatch: pytest.MonkeyPatch, kind: str, march: str, reason: str
) -> None:
    monkeypatch.setattr(_build, "cpu_kind", lambda: kind)
    monkeypatch.setenv("CROSSAN_FAST_MARCH", march)
    _dispatch._measured_on_cpus.cache_clear()
    said = _dispatch._measured_on_cpus()
    _dispatch._measured_on_cpus.cache_clear()
    assert reason in said and said.startswith("measured") == ("not yet" not in reason)


def test_the_rows_that_reasons_name_are_all_that_were_measured_on_cpus() -> None:
    # torch's words in a row's device, and ours
    vectors = {"AVX512": "AVX-512", "AVX512 AMX": "AVX-512 and AMX"}
    found = set()
    for path in results.files(results.FOLDER):
        for row in results.read(path):
            if "cores" in row.device:
                word, maker = row.device.rpartition(", ")[2], row.device.partition(" ")[0].partition("(")[0]
                found.add((f"{maker} with {vectors.get(word, word)}", path.name))
    assert found == set(_dispatch._CPU_RESULTS.items())


@pytest.mark.parametrize(
    "flags, said", [("avx avx2 avx512f", "AVX-512"), ("avx avx2", "AVX2"), ("asimd sve", "SVE")]
)
def test_vectors_are_read_from_the_cpus_flags(monkeypatch: pytest.MonkeyPatch, flags: str, said: str) -> None:
    monkeypatch.setattr(_build, "cpu_flags", flags.split)
    assert _build.vectors() == said


def test_a_misspelt_variable_is_shown(
    backends: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSAN_FAST_BACKND", "eager")
    monkeypatch.setenv("CROSSAN_FAST_CPU_L2", "1024")
    monkeypatch.setenv("CROSSAN_FAST_SUITE_SECONDS", "1")
    assert main(["doctor"]) == 0
    assert {
        "  CROSSAN_FAST_BACKND eager  (nothing reads this name; did you mean 'CROSSAN_FAST_BACKEND'?)",
        "  CROSSAN_FAST_CPU_L2 1024",
    } == {line for line in capsys.readouterr().out.splitlines() if line.startswith("  CROSSAN_FAST_")}


def test_every_variable_that_the_library_reads_is_known() -> None:
    package = Path(_library.__file__).parent
    sources = [package, package.parent / "kernels", _build.CSRC]
    files = [file for folder in sources for file in folder.rglob("*") if file.suffix in {".py", ".cpp", ".h"}]
    text = "\n".join(file.read_text(encoding="utf-8") for file in [*files, package.parent / "setup.py"])
    read = re.findall(r"""(?:environ\.get\(|environ\[|getenv\(|\n[A-Z_]+ = )"(CROSSAN_FAST_\w+)""", text)
    assert len(read) > 8 and set(read) == set(doctor._VARIABLES)
