"""Comparing runs, and the tables of README and the site from recorded rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import compare, pages, report, results
from benchmarks.__main__ import main
from benchmarks.results import Row
from benchmarks.targets import TARGETS, Target

ROW = Row(
    commit="abc1234567",
    date="2026-01-01T00:00Z",
    device="Some CPU, 2 cores",
    threads=2,
    torch="2.11",
    triton="3.6",
    case="side_network/N=704,M=4,D=768,L=7,r=64",
    backend="cpp",
    dtype="fp32",
    passes="both",
    samples=20,
    p20_ms=90.0,
    p50_ms=100.0,
    p80_ms=105.0,
    peak_bytes=100 << 20,
    floor_ms=50.0,
    floor_share=0.5,
    copy_gbps=25.0,
    matmul_tflops=0.3,
)


def timed(p20: float, p50: float, p80: float) -> Row:
    return replace(ROW, p20_ms=p20, p50_ms=p50, p80_ms=p80)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (timed(110, 120, 130), "SLOWER"),
        (timed(100, 120, 130), "same"),  # its quick calls are as quick as the old slow ones
        (timed(106, 109, 112), "same"),  # 9 % is within the bound
        (timed(60, 70, 80), "faster"),
        (replace(ROW, peak_bytes=120 << 20), "HEAVIER"),
        (replace(ROW, peak_bytes=None), "same"),
    ],
)
def test_a_change_is_judged_against_the_noise(new, verdict):
    (change,) = compare.changes([ROW], [new])
    assert str(change).startswith(verdict)


def test_other_machines_and_threads_are_not_compared():
    assert not compare.changes([ROW], [replace(ROW, threads=1), replace(ROW, device="Other")])


def test_compare_reads_files_and_commits_and_exits_by_the_result(tmp_path, capsys, monkeypatch):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    results.append(old, [ROW])
    results.append(new, [timed(190, 200, 210)])
    assert main(["compare", str(old), str(old)]) == 0
    assert main(["compare", str(old), str(new)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert compare.load("abc12", tmp_path)[0].commit == "abc1234567"
    with pytest.raises(ValueError, match="neither a CSV file nor a commit"):
        compare.load("fff", tmp_path)


def test_a_target_is_computed_from_rows():
    rows = results.latest([ROW, replace(ROW, backend="eager", p50_ms=350.0, peak_bytes=900 << 20)])
    target = Target("t", "cpu", ROW.case, "fp32", "time", 3, (ROW.case, "fp32", "eager"))
    value, row = target.measured(rows)
    assert value == pytest.approx(3.5) and row.backend == "cpp" and target.met(value)
    assert not replace(target, bound=4).met(value)
    memory = replace(target, quantity="memory", bound=10)
    value, _ = memory.measured(rows)
    assert value == pytest.approx(9) and not memory.met(value) and memory.shown(value) == "1/9.0"
    assert replace(target, quantity="seconds").measured(rows)[0] == pytest.approx(0.1)
    assert replace(target, quantity="floor").measured(rows)[0] == 0.5
    slower = replace(target, quantity="slowdown")
    assert slower.measured(rows)[0] == pytest.approx(1 / 3.5)
    assert target.measured(results.latest([ROW])) is None


def test_every_target_names_registered_cases():
    from benchmarks import registry

    names = {case.name for case in registry.all_cases()}
    for target in TARGETS:
        assert target.case in names, target
        assert target.against is None or target.against[0] in names, target


def test_pages_are_drawn_from_the_files(tmp_path):
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    readme.write_text(
        "# top\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nend\n"
        "<!-- targets:begin -->\n<!-- targets:end -->\n"
    )
    page.write_text(
        "<!-- results:begin -->\n<!-- results:end -->\n<!-- reliability:begin -->\n<!-- reliability:end -->\n"
    )
    (page.parent / "other.md").write_text("nothing\n")
    folder = tmp_path / "results"
    rows = [
        replace(ROW, case=f"item_encoder/N={n},M=4,D=768,L=7,r=64", backend=backend, p50_ms=n * factor)
        for n in (704, 20_314)
        for backend, factor in (("eager", 3.0), ("cpp", 1.0))
    ]
    results.append(folder / "some-cpu.csv", [ROW, *rows])
    plot = folder / "some-cpu.items.png"
    assert pages.write(tmp_path, folder) == [plot, readme, page] and plot.stat().st_size > 1000
    short, long = readme.read_text(), page.read_text()
    assert short.startswith("# top\n") and "\nend\n" in short and "old" not in short
    assert (
        "| Some CPU, 2 cores | 2,112 |  | 704 | 3.0 |  | 104.9 → 104.9 |" in short
        and short.count("| Some CPU, 2 cores |") == 1
    )
    assert "No GPU was measured yet." in short and "| ≥ 2.9× | 3.0× (cpp) | met |" in long
    assert "| item_encoder/N=704,M=4,D=768,L=7,r=64 | fp32 | 2.11e+03 |  | 704 cpp | 3.0 |" in long
    assert "not measured" in long and "Nothing is recorded yet." in long
    assert "(../results/some-cpu.items.png)" in long
    (folder / "reliability.csv").write_text("fault,what_happened\nkilled,whole\n")
    pages.write(tmp_path, folder)
    assert readme.read_text() == short
    assert "| fault | what happened |\n| --- | --- |\n| killed | whole |" in page.read_text()


def gpu_rows() -> list[Row]:
    """Of every number that the GPU's targets read: a 30th of eager's time and of its memory."""
    rows = []
    for target in (t for t in TARGETS if t.device == "cuda"):
        passes = "both" if "encoder" in target.case or "loss/" in target.case else "run"
        gpu = replace(ROW, device="NVIDIA Some GPU", case=target.case, dtype="bf16", passes=passes)
        graph = replace(gpu, backend="auto-graph", p50_ms=1.0, peak_bytes=None, floor_share=0.6)
        rows += [graph, replace(graph, backend="triton", p50_ms=2.0, peak_bytes=1 << 20)]
        for backend in ("eager", "compiled"):
            rows.append(replace(gpu, backend=backend, p50_ms=30.0, peak_bytes=30 << 20))
    return rows


def test_the_pages_have_the_gpus_targets_met_or_missed(tmp_path):
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    readme.write_text("<!-- targets:begin -->\n<!-- targets:end -->\n")
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    folder, rows = tmp_path / "results", gpu_rows()
    results.append(folder / "nvidia.csv", rows)
    pages.write(tmp_path, folder)
    targets = [line for line in readme.read_text().splitlines() if line.startswith("| ")][2:]
    asked = [t for t in TARGETS if t.device == "cuda"]
    assert len(targets) == len(asked) and all(line.endswith("| met |") for line in targets)
    assert "| training step, B = 64, against eager | ≥ 20× | 30.0× (auto-graph) | met |" in targets
    assert "| memory of a step, B = 1,024 | ≤ 1/15 | 1/30.0 (triton) | met |" in targets
    assert any("epoch of the Scientific data's shape" in line for line in targets)
    results.append(folder / "nvidia.csv", [replace(row, p50_ms=300.0) for row in rows])
    pages.write(tmp_path, folder)
    assert readme.read_text().count("**missed**") == sum(t.quantity in ("time", "seconds") for t in asked)
    assert page.read_text().count("epoch/data=synthetic,B=64,M=4") == 2


@pytest.mark.parametrize("text", ["<!-- targets:begin -->\n", "<!-- tragets:begin -->\n<!-- tragets:end -->"])
def test_a_page_with_wrong_marks_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: expected"):
        pages.write(tmp_path, tmp_path)
    assert readme.read_text() == text
    assert "cpp" in report.summary([ROW])


def test_the_site_shows_recorded_kernels_and_recipes():
    for name in ("aot", "recipes", "basis", "ablations", "encoders"):
        drawn = pages.DRAWINGS[name](results.FOLDER, results.ROOT / "docs")
        assert drawn.count("\n| ") > 5 and "](s" not in drawn, name


def test_readme_and_pages_hold_what_the_rows_say():
    """As `python -m benchmarks report` writes them: a row that is added goes with its pages."""
    every = [results.ROOT / "README.md", *sorted((results.ROOT / "docs").glob("*.md"))]
    for page in every:
        text = page.read_text(encoding="utf-8")
        assert pages.fill(text, page) == text, f"{page.name}: run python -m benchmarks report"
