"""Steps, evaluation and cache at a few rows: each case builds, passes its own check and can be called."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import _shared, cache, cache_build, epoch, evaluation, side_network, step
from benchmarks.registry import CheckFailed, Setting, Unavailable
from crossan_fast.training import Batches, graph

CPU = torch.device("cpu")
SMALL = side_network.Shape(items=9, modalities=2, width=16, levels=3, rank=4, embedding=8)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for module in (side_network, step, evaluation):
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
    ids = _shared.random_sequences(6, 300, CPU, setting.generator("ids"))
    states = step.random_cache(SMALL, 300, setting, torch.bfloat16)
    bench = step.StepBench(setting, SMALL.config(), states, [ids], torch.ones(301))
    right, wrong = bench.made("eager"), bench.made("eager")
    bench.check("right", right)
    step_of, model = wrong.step, wrong.step.model
    step_of.forward_backward = lambda ids: 1.001 * model(ids, cache=step_of.cache).loss
    with pytest.raises(CheckFailed, match="wrong: loss errs by"):
        bench.check("wrong", wrong)


class Recorder:
    """Stands for a device's graphs: captures record what to run."""

    def __init__(self, device):
        self.captured = 0

    def warm(self, body):
        return body()

    def capture(self, body):
        self.captured += 1
        loss = torch.zeros(())
        return lambda: loss.copy_(body()), loss


def test_a_captured_step_is_checked_and_captured_before_it_is_timed(monkeypatch):
    recorders = []

    def graphs(device):
        recorders.append(Recorder(device))
        return recorders[-1]

    monkeypatch.setattr(graph, "CudaGraphs", graphs)
    monkeypatch.setattr(step, "refusal", lambda _: None)
    workload = step.build(SMALL, 6, "in_batch", Setting(CPU, torch.float32))
    monkeypatch.setattr(step.StepBench, "step", functools.partialmethod(eager_step, step.StepBench.step))
    runnable = workload.implementations["triton-graph"]()
    assert not runnable.memory
    workload.check("triton-graph", runnable)
    assert recorders[0].captured == 1
    first, later = (float(runnable.forward(0)[0]) for _ in range(2))
    assert recorders[0].captured == 1 and first != later

    def refuse(self, body):
        raise RuntimeError("not permitted")

    monkeypatch.setattr(Recorder, "capture", refuse)
    with (
        pytest.warns(UserWarning, match="one kernel at a time"),
        pytest.raises(CheckFailed, match="triton-graph: capture failed: not permitted"),
    ):
        workload.check("triton-graph", workload.implementations["triton-graph"]())


def eager_step(self, make, backend, deduplicate=True):
    assert backend in ("triton", "eager")
    return make(self, "eager", deduplicate)


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
        epoch.build_scientific(SMALL, Setting(CPU, torch.float32))


def test_a_synthetic_epoch_has_the_shape_of_the_data(data_folder, monkeypatch):
    """Users, lengths and items are the data's; distinct items, which a step's cost depends on, follow."""
    monkeypatch.setenv("CROSSAN_FAST_DATA", str(data_folder))
    setting = Setting(CPU, torch.float32)
    (real, counts), made = epoch.scientific_sequences(setting), epoch.synthetic_sequences(setting)
    lengths, own = ((rows != 0).sum(1).sort().values for rows in (real, made))
    assert torch.equal(lengths, own) and made.shape == real.shape
    assert len(counts) > made.max() > 0.9 * len(counts)
    assert not ((made[:, :-1] != 0) & (made[:, 1:] == 0)).any()
    batches = (Batches(rows, 64, seed=0) for rows in (real, made))
    distinct = [sum(counted.distinct(1)) / len(counted) for counted in batches]
    assert distinct[1] == pytest.approx(distinct[0], rel=0.02)


def test_a_synthetic_epoch_trains(monkeypatch):
    monkeypatch.setattr(epoch, "CATALOGUE", 300)
    monkeypatch.setattr(epoch, "POPULARITY", {1: 40, 11: 6, 300: 1})
    monkeypatch.setattr(epoch, "LENGTHS", {3: 60, 11: 10})
    workload = epoch.build_synthetic(SMALL, Setting(CPU, torch.float32))
    runnable = workload.implementations["eager"]()
    workload.check("eager", runnable)
    assert runnable.forward(0)[0].shape == (2,)
    with pytest.raises(Unavailable, match="graphs need a CUDA device, got cpu"):
        workload.implementations["auto-graph"]()


def test_an_epoch_is_called_a_few_times_whatever_the_minimum(monkeypatch, tmp_path):
    folder = tmp_path / "scientific"
    folder.mkdir()
    (folder / "items.tsv").write_text("".join(f"i{n}\ttitle {n}\n" for n in range(1, 31)))
    (folder / "users.tsv").write_text(
        "".join(f"u{n}\t{' '.join(f'i{1 + (n + k) % 30}' for k in range(6))}\n" for n in range(70))
    )
    monkeypatch.setenv("CROSSAN_FAST_DATA", str(tmp_path))
    workload = epoch.build_scientific(SMALL, Setting(CPU, torch.float32))
    runnable = workload.implementations["eager"]()
    workload.check("eager", runnable)
    samples = timing.interleaved({"eager": runnable}, CPU, 1, 1.0, 20)["eager"]
    assert len(samples.passes["run"]) == timing.LONG_ROUNDS
    assert runnable.forward(0)[0].shape == (2,)  # 70 users in batches of 64
