"""Steps, evaluation and cache at a few rows: each case builds, passes its own check and can be called."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import cache, cache_build, evaluation, losses, ranking, side_network, step
from benchmarks.registry import CheckFailed, Setting, Unavailable

CPU = torch.device("cpu")
SMALL = side_network.Shape(items=9, modalities=2, width=16, levels=3, rank=4, embedding=8)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for module in (side_network, losses, ranking, step, evaluation):
        monkeypatch.setattr(module, "CATALOGUE", 300)
    for module in (step, cache):
        monkeypatch.setattr(module, "RECIPE", SMALL)
    monkeypatch.setattr(step, "CHECKED_ITEMS", 50)


@pytest.mark.parametrize(
    "build",
    [
        partial(step.build, SMALL, 6, "in_batch"),
        partial(step.build, SMALL, 6, "full"),
        partial(evaluation.build_ranking, SMALL, 20),
        partial(evaluation.build_catalogue, SMALL),
        partial(cache.build_open, SMALL, 50),
        partial(cache.build_write, SMALL, 50),
        partial(cache.build_gather, SMALL, 50),
        partial(cache.build_step, 500, True),
        partial(cache.build_step, 500, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_passes_its_check_and_is_timed(build, dtype):
    workload = build(Setting(CPU, dtype))
    made = {name: make for name, make in workload.implementations.items() if name in ("eager", "host")}
    for name, make in made.items():
        runnable = make()
        workload.check(name, runnable)
        samples = timing.interleaved({name: runnable}, CPU, workload.sets, 0.0, 5)[name]
        assert len(samples.passes["run"]) == 5


def test_the_compiled_step_runs_what_was_compiled(monkeypatch):
    entered = []

    def compile_nothing(call, **options):
        def compiled(*args, **kwargs):
            entered.append(options["mode"])
            return call(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_nothing)
    workload = step.build(SMALL, 6, "in_batch", Setting(CPU, torch.float32))
    workload.implementations["compiled"]().forward(0)
    assert entered == ["max-autotune"]


def test_a_cache_is_built_as_the_plain_loop_encodes():
    pytest.importorskip("transformers")
    workload = cache_build.build(70, 16, 2, Setting(CPU, torch.float32))
    for name, make in workload.implementations.items():
        workload.check(name, make())
    right = workload.implementations["host"]()
    swapped = type(right)(lambda index: [right.forward(index)[0].flip(0)])
    with pytest.raises(CheckFailed, match="states err by"):
        workload.check("host", swapped)


def test_a_step_trains():
    workload = step.build(SMALL, 6, "in_batch", Setting(CPU, torch.float32))
    runnable = workload.implementations["eager"]()
    first = float(runnable.forward(0)[0])
    for _ in range(40):
        last = float(runnable.forward(0)[0])
    assert last < first


def test_a_wrong_step_is_seen(monkeypatch):
    setting = Setting(CPU, torch.float32)
    ids = losses.random_sequences(6, 300, CPU, setting.generator("ids"))
    states = step.random_cache(SMALL, 300, setting, torch.bfloat16)
    bench = step.StepBench(setting, SMALL.config(), states, [ids], torch.ones(301))
    right, wrong = bench.step("eager"), bench.step("eager")
    bench.check("right", right)
    model = wrong.model
    wrong.forward_backward = lambda ids: 1.001 * model(ids, cache=wrong.cache).loss
    with pytest.raises(CheckFailed, match="wrong: loss errs by"):
        bench.check("wrong", wrong)


def test_wrong_ranks_are_seen():
    workload = evaluation.build_ranking(SMALL, 20, Setting(CPU, torch.float32))
    runnable = workload.implementations["eager"]()
    shifted = type(runnable)(lambda index: [runnable.forward(index)[0] + 1])
    with pytest.raises(CheckFailed, match="a rank is off by 1"):
        workload.check("cpp", shifted)


def test_a_mapped_catalogue_is_read_from_files_that_go_with_it():
    folder = cache.TemporaryCache(SMALL, 50)
    path = folder.path
    folder.forget()
    assert (path / "meta.json").is_file()
    del folder
    assert not path.exists()


def test_a_cache_larger_than_the_disk_is_not_tried(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(Unavailable, match="on disk"):
        cache.TemporaryCache(SMALL, 50)


def test_the_epoch_needs_the_data(monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSAN_FAST_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match="CROSSAN_FAST_DATA"):
        step.build_epoch(Setting(CPU, torch.float32))


def test_an_epoch_is_called_a_few_times_whatever_the_minimum(monkeypatch, tmp_path):
    folder = tmp_path / "scientific"
    folder.mkdir()
    (folder / "items.tsv").write_text("".join(f"i{n}\ttitle {n}\n" for n in range(1, 31)))
    (folder / "users.tsv").write_text(
        "".join(f"u{n}\t{' '.join(f'i{1 + (n + k) % 30}' for k in range(6))}\n" for n in range(70))
    )
    monkeypatch.setenv("CROSSAN_FAST_DATA", str(tmp_path))
    workload = step.build_epoch(Setting(CPU, torch.float32))
    runnable = workload.implementations["eager"]()
    workload.check("eager", runnable)
    samples = timing.interleaved({"eager": runnable}, CPU, 1, 1.0, 20)["eager"]
    assert len(samples.passes["run"]) == timing.LONG_ROUNDS
    assert runnable.forward(0)[0].shape == (2,)  # 70 users in batches of 64
