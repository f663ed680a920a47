"""The suite itself, on cases of a few rows: checks come before speed, and what is written can be read."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, ceilings, measure, memory, registry, results, timing
from benchmarks.__main__ import main
from benchmarks.cases import (
    _shared,
    batch_rows,
    deduplicate,
    full_loss,
    fusion,
    in_batch_loss,
    rank_of_target,
    side_network,
    topk_scores,
)
from benchmarks.operators import Operator
from benchmarks.registry import Case, CheckFailed, Floor, Runnable, Setting, Unavailable, Workload

CPU = torch.device("cpu")
SMALL = side_network.Shape(items=9, modalities=2, width=16, levels=3, rank=4, embedding=8)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    """The real ones take seconds."""
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: ceilings.Ceilings(1e9, 1e9))


def options(tmp_path: Path, **changes) -> measure.Options:
    defaults = {
        "device": CPU,
        "path": tmp_path / "r.csv",
        "seconds": 0.0,
        "minimum": 5,
        "say": lambda _: None,
    }
    return measure.Options(**{**defaults, **changes})


def add_case(**implementations) -> Case:
    """A case that adds 1; an implementation is what it adds instead, or an exception."""
    inputs = [torch.arange(4.0) + i for i in range(3)]

    def make(value):
        if isinstance(value, Exception):
            raise value
        return Runnable(lambda index: [inputs[index] + value])

    def check(name, runnable):
        if not torch.equal(runnable.forward(0)[0], inputs[0] + 1):
            raise CheckFailed("wrong sum")

    workload = Workload(
        3, {name: partial(make, value) for name, value in implementations.items()}, check, {"run": Floor(1e6)}
    )
    return Case("add/n=4", lambda setting: workload, dtypes=("fp32",))


def test_a_case_gives_a_row_a_pass_that_can_be_read_again(tmp_path):
    case = Case("small", partial(side_network.build_item_encoder, SMALL), dtypes=("fp32", "bf16"))
    outcome = measure.run([case], options(tmp_path, only=("eager", "autocast")))
    assert not outcome.failures
    assert [(r.dtype, r.backend, r.passes) for r in outcome.rows] == [
        (dtype, backend, passes)
        for dtype, backend in (("fp32", "eager"), ("bf16", "eager"), ("bf16", "autocast"))
        for passes in ("forward", "backward", "both")
    ]
    for row in outcome.rows:
        assert row.samples >= 5 and 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.floor_share == pytest.approx(row.floor_ms / row.p50_ms)
    read = results.read(tmp_path / "r.csv")
    assert [r.key for r in read] == [r.key for r in outcome.rows]
    assert [r.p50_ms for r in read] == pytest.approx([r.p50_ms for r in outcome.rows], rel=1e-4)


def test_a_wrong_implementation_has_no_speed_and_fails_the_run(tmp_path):
    outcome = measure.run([add_case(eager=1, cpp=2)], options(tmp_path))
    assert [r.backend for r in outcome.rows] == ["eager"]
    assert outcome.failures == ["add/n=4 fp32 cpp: wrong sum"]


def test_a_crash_fails_the_run_and_spares_the_others(tmp_path):
    outcome = measure.run([add_case(cpp=RuntimeError("boom\nmore"), eager=1)], options(tmp_path))
    assert [r.backend for r in outcome.rows] == ["eager"]
    assert outcome.failures == ["add/n=4 fp32 cpp: RuntimeError: boom"]


def test_what_cannot_run_here_is_skipped_with_its_reason(tmp_path):
    said: list[str] = []
    outcome = measure.run(
        [add_case(eager=1, cuda=Unavailable("no device"))], options(tmp_path, say=said.append)
    )
    assert not outcome.failures
    assert outcome.skipped == ["add/n=4 fp32 cuda: no device"]
    assert any("no device" in line for line in said)


def test_a_backend_that_refuses_is_skipped(tmp_path):
    case = Case("small", partial(side_network.build_side_network, SMALL), dtypes=("fp32",))
    outcome = measure.run([case], options(tmp_path, only=("eager", "cuda")))
    assert not outcome.failures and {r.backend for r in outcome.rows} == {"eager"}
    assert "'cuda' was asked for on cpu" in outcome.skipped[0]


def test_a_check_alone_measures_nothing(tmp_path):
    called: list[str] = []
    workload = Workload(
        2, {"eager": lambda: Runnable(lambda index: called.append(f"set {index}") or [])}, lambda *_: None
    )
    case = Case("counted/n=1", lambda setting: workload, ("fp32",))
    outcome = measure.check([case, add_case(eager=1, cpp=2)], options(tmp_path), calls=3)
    assert outcome.failures == ["add/n=4 fp32 cpp: wrong sum"] and not outcome.rows
    assert called == ["set 0", "set 1", "set 0"] and not (tmp_path / "r.csv").exists()


def test_no_case_begins_past_the_budget(tmp_path):
    outcome = measure.run([add_case(eager=1)], options(tmp_path, budget=0.0))
    assert not outcome.rows and "the budget of 0 s" in outcome.skipped[0]


@pytest.mark.long
def test_what_this_commit_has_rows_of_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "one")
    results.environment.cache_clear()
    ask = partial(options, tmp_path, missing=True)
    try:
        assert len(measure.run([add_case(eager=1)], ask(only=("eager",))).rows) == 1
        assert not measure.run([add_case(eager=1)], ask(only=("eager",))).rows
        both = measure.run([add_case(eager=1, cpp=1)], ask(only=("eager", "cpp")))
        assert [r.backend for r in both.rows] == ["eager", "cpp"]
        assert not measure.run([add_case(eager=1, cpp=1)], ask(only=("eager", "autocast", "cpp"))).rows
        for unsure in ("two", "two+", "two+"):
            monkeypatch.setattr(results, "commit", lambda commit=unsure: commit)
            results.environment.cache_clear()
            assert len(measure.run([add_case(eager=1)], ask(only=("eager",))).rows) == 1
    finally:
        results.environment.cache_clear()


def test_a_reference_that_does_not_fit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    case = Case("small", partial(side_network.build_side_network, SMALL), ("fp32",), reference_bytes=1e9)
    outcome = measure.run([case], options(tmp_path, only=("eager",)))
    assert not outcome.rows and "needs 1.0 GB, more than is free" in outcome.skipped[0]


def changed(operator_call, place: int):
    """An implementation that is right but for one element in a million's worth of error."""

    def call(weights, inputs, backend):
        (output,) = operator_call(weights, inputs, "eager")
        if backend == "cpp":
            bump = torch.zeros_like(output)
            bump.view(-1)[place] = 1e-2 * output.detach().abs().max()
            output = output + bump
        return [output]

    return call


@pytest.mark.parametrize("place", [0, -1])
def test_the_check_sees_one_wrong_element(monkeypatch, place):
    made = []
    workload = Operator.workload
    monkeypatch.setattr(Operator, "workload", lambda self, *a: made.append(self) or workload(self, *a))
    built = side_network.build_side_network(SMALL, Setting(CPU, torch.float32))
    built.check("eager", built.implementations["eager"]())
    made[0].call = changed(made[0].call, place)
    with pytest.raises(CheckFailed, match="cpp: output 0 errs by"):
        built.check("cpp", built.implementations["cpp"]())


@pytest.mark.parametrize(
    "build",
    [
        partial(side_network.build_side_network, SMALL),
        partial(side_network.build_item_encoder, SMALL),
        partial(fusion.build, SMALL, None),
        partial(in_batch_loss.build, 5),
        partial(full_loss.build, 2),
        partial(side_network.build_missing, SMALL, "crossan"),
        partial(side_network.build_missing, SMALL, "iisan"),
        partial(side_network.build_gather, SMALL, torch.int8),
        partial(side_network.build_gather, SMALL, torch.float8_e4m3fn),
        partial(side_network.build_gather, SMALL, torch.bfloat16),
        partial(_shared._ranking_workload, "topk_scores", topk_scores.rank, 3),
        partial(_shared._ranking_workload, "rank_of_target", rank_of_target.rank, 3),
        partial(deduplicate.build, 7),
        partial(batch_rows.build, 7),
    ],
)
def test_every_kind_of_case_passes_its_own_check(monkeypatch, build):
    for module in (side_network, _shared, in_batch_loss, full_loss, deduplicate, batch_rows):
        monkeypatch.setattr(module, "CATALOGUE", 57)
    monkeypatch.setattr(side_network, "PART", 4)  # several pieces
    for dtype in (torch.float32, torch.bfloat16):
        workload = build(Setting(CPU, dtype))
        for name in ("eager", "autocast"):
            if name in workload.implementations:
                workload.check(name, workload.implementations[name]())


@pytest.mark.parametrize(
    "build", [partial(in_batch_loss.build, 6), partial(side_network.build_side_network, SMALL)]
)
def test_a_reference_in_pieces_is_the_reference(monkeypatch, build):
    made = []
    workload = Operator.workload
    monkeypatch.setattr(Operator, "workload", lambda self, *a: made.append(self) or workload(self, *a))
    monkeypatch.setattr(in_batch_loss, "CATALOGUE", 57)
    monkeypatch.setattr(side_network, "PART", 4)
    build(Setting(CPU, torch.float32))
    pieces = made[0]._by_parts(torch.float64)
    made[0].split = None
    for piece, whole in zip(pieces, made[0]._by_parts(torch.float64), strict=True):
        torch.testing.assert_close(piece.double(), whole.double(), rtol=1e-12, atol=1e-12)


def test_a_loss_in_several_pieces_is_the_loss(monkeypatch):
    monkeypatch.setattr(in_batch_loss, "CATALOGUE", 57)
    monkeypatch.setattr(in_batch_loss, "PART_ELEMENTS", 400)
    workload = in_batch_loss.build(6, Setting(CPU, torch.float32))
    workload.check("eager", workload.implementations["eager"]())


def test_gates_are_judged_together_and_one_that_is_wrong_is_seen():
    """Sums of few numbers err by chance, in this tower or in that; a mistake in one of them is no chance."""
    names = ["weight", "towers.m0.cross.m1", "towers.m1.cross.m0", "towers.m1.gate"]
    torch.manual_seed(0)
    truth = [torch.randn(9, 9).double(), *(torch.randn(7).double() for _ in range(3))]
    plain = [
        t + e * t.norm() / t.numel() ** 0.5 for t, e in zip(truth, (1e-3, 1e-3, 2e-2, 1e-3), strict=True)
    ]
    lucky = [
        plain[0],
        *(t + e * t.norm() / 7**0.5 for t, e in zip(truth[1:], (2e-2, 1e-3, 1e-3), strict=True)),
    ]
    wrong = [lucky[0], truth[1] * 1.2, *lucky[2:]]

    def judged(found: list[torch.Tensor]) -> None:
        joined, (exact, own, ours) = accuracy.together(names, truth, plain, found)
        assert joined == ["weight", "towers.m*.cross.m*", "towers.m*.gate"]
        assert exact[1].shape == (14,)
        errors = [accuracy.error(p, t) for p, t in zip(own, exact, strict=True)]
        accuracy.compare("cpp", joined, ours, exact, errors, torch.bfloat16, terms=1)

    judged(lucky)
    with pytest.raises(CheckFailed, match=r"cpp: towers\.m\*\.cross\.m\* errs by"):
        judged(wrong)


def test_names_are_unique_and_every_case_has_an_op_and_sizes():
    cases = registry.all_cases()
    assert len({case.name for case in cases}) == len(cases) > 40
    assert all("/" in case.name and "=" in case.name for case in cases)
    assert cases[0].name.startswith("item_encoder/N=704")
    selected = registry.select("side_network/*N=704,M=4,D=768*", ["paper"], "cpu")
    assert [case.name for case in selected] == ["side_network/N=704,M=4,D=768,L=7,r=64"]


def test_percentiles():
    samples = timing.Samples({"run": [i / 1e3 for i in range(11)]})
    assert samples.milliseconds("run") == pytest.approx((2, 5, 8))


def test_sets_are_rotated():
    seen: list[int] = []
    runnable = Runnable(lambda index: seen.append(index) or [])
    timing.interleaved({"eager": runnable}, CPU, 3, 0.0, 10)
    assert {seen.count(i) for i in range(3)} <= set(range(3, 9)) and set(seen) == {0, 1, 2}


def test_a_long_call_is_not_repeated_more_than_it_has_to(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.0)
    called: list[int] = []
    workload = Workload(
        1, {"eager": lambda: Runnable(lambda index: called.append(index) or [])}, lambda *_: None
    )
    outcome = measure.run([Case("slow/n=1", lambda setting: workload, ("fp32",))], options(tmp_path))
    weighed = 0 if memory._libc() is None else 1
    assert len(called) == 2 + timing.LONG_ROUNDS + weighed
    assert outcome.rows[0].samples == timing.LONG_ROUNDS


@pytest.mark.skipif(memory._libc() is None, reason="peak memory on a CPU needs glibc and /proc")
def test_peak_memory_is_the_highest_point_not_the_sum():
    def call():
        for _ in range(3):
            torch.ones(8 << 20)  # 32 MiB each, freed at once
        return torch.ones(2 << 20)

    torch.ones(8 << 20)
    assert memory.peak_added(call, CPU) == pytest.approx(32 << 20, abs=2 << 20)
    assert memory.peak_added(lambda: None, CPU) == pytest.approx(0, abs=2 << 20)


@pytest.mark.skipif(memory._libc() is None, reason="peak memory on a CPU needs glibc and /proc")
def test_peak_memory_does_not_see_blocks_freed_before():
    # A process that ran other things keeps freed blocks, which are neither mapped nor given back.
    libc = memory._libc()
    assert libc.mallopt(memory._MMAP_THRESHOLD, 32 << 20) and libc.mallopt(memory._TRIM_THRESHOLD, 1 << 30)
    blocks = [libc.malloc((16 << 20) + 100) for _ in range(9)]
    try:
        for index, block in enumerate(blocks):
            if index % 3 != 2:  # each two freed ones become one that just holds 32 MiB
                libc.free(block)
        assert memory.peak_added(lambda: [torch.ones(8 << 20) for _ in range(2)], CPU) == pytest.approx(
            64 << 20, abs=2 << 20
        )
        assert memory.peak_added(lambda: sum(torch.ones(8 << 20)[0] for _ in range(3)), CPU) == pytest.approx(
            32 << 20, abs=2 << 20
        )
    finally:
        for block in blocks[2::3]:
            libc.free(block)
        memory.settle()


def test_a_floor_is_bound_by_the_slower_of_bytes_and_arithmetic():
    limits = ceilings.Ceilings(copy=1e9, matmul=1e12)
    assert limits.milliseconds(Floor(bytes=1e6, flops=1e6)) == pytest.approx(1.0)
    assert limits.milliseconds(Floor(bytes=1e3, flops=1e10)) == pytest.approx(10.0)


def test_the_paper_floor_is_performance_mds():
    per_item = side_network.Shape(items=1_000_000).side_floors(2)["both"]
    assert per_item.flops / 1e6 == pytest.approx(12.2e6, rel=0.01)
    states = 2 * 4 * 7 * 768 * 2
    assert states <= per_item.bytes / 1e6 <= 1.4 * states


def test_a_batchs_floor_holds_the_products_of_weights_alone():
    batch, none = (side_network.Shape(items=items).side_floors(4) for items in (704, 0))
    # At the paper's d = r the head is one more level: 28 pairs of levels in each of four towers.
    one_product = 2.0 * 64 * 768 * 64
    assert none["forward"].flops == 4 * 28 * one_product
    assert none["both"].flops == 3 * none["forward"].flops
    assert none["both"].flops / batch["both"].flops == pytest.approx(0.2, abs=0.005)


def test_a_narrow_towers_floor_is_with_h():
    shape = side_network.Shape(items=1000, modalities=2, width=128)
    floor = shape.side_floors(4)
    level, head = 2.0 * 2000 * 128 * 64, 2.0 * 2000 * 128 * 64
    assert floor["forward"].flops == 2 * 7 * level + head
    assert floor["backward"].flops == 5 * 7 * level + 2 * head


def test_a_file_of_another_layout_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns"):
        results.read(path)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) Processor, 2 cores, AVX512", "intel-xeon-2-cores-avx512"),
    ],
)
def test_file_names(name, slug):
    assert results.slug(name) == slug


def test_command_line(tmp_path, capsys):
    assert main(["list", "deduplicate", "--device", "cpu"]) == 0
    assert "deduplicate/users=64,places=704" in capsys.readouterr().out
    path = tmp_path / "r.csv"
    arguments = ["deduplicate/users=64", "--device", "cpu", "--seconds", "0.01", "--output", str(path)]
    assert main(["run", *arguments, "--only", "eager"]) == 0
    assert math.isfinite(results.read(path)[0].p50_ms)
    with pytest.raises(SystemExit, match="2"):
        main(["run", "no such case", "--device", "cpu"])
    with pytest.raises(SystemExit, match="unknown"):
        main(["run", "--only", "eagre"])
