"""The step: rows from every cache tier, batches fed ahead, and graphs whose capture is a recorder's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, _sources, ops
from crossan_fast._sources import ReadAhead
from crossan_fast.cache.staging import Rows
from crossan_fast.cache.writer import write_cache
from crossan_fast.training import Batches, OptimizerConfig, TrainStep, make_optimizer
from crossan_fast.training.feed import bucket, feed
from crossan_fast.training.graph import CudaGraphs, GraphedStep, refusal

ITEMS, LEVELS, ROWS = 40, 3, 21
MODALITIES = (Modality("text", 12, LEVELS), Modality("image", 20, LEVELS))
CPU = torch.device("cpu")


def written(folder: Path, dtype: torch.dtype | None = None) -> HiddenStateCache:
    """A cache of random states, some absent, opened."""
    generator = torch.Generator().manual_seed(0)
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width, generator=generator) for m in MODALITIES}
    present = torch.rand(ITEMS + 1, 2, generator=generator) < 0.8
    present[present.sum(1) == 0] = True
    present[0] = False
    for column, state in enumerate(states.values()):
        state[~present[:, column]] = 0
    write_cache(folder, states, present=present, dtype=dtype)
    return HiddenStateCache.open(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> HiddenStateCache:
    return written(tmp_path_factory.mktemp("step") / "cache")


@pytest.fixture(scope="module", params=[torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HiddenStateCache:
    return written(tmp_path_factory.mktemp("step") / "cache", request.param)


def make_model(**options: Any) -> CrossanModel:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"bottleneck": 4, "embedding_dim": 8, "window": 4, "dropout": 0.0}
    model = CrossanModel(CrossanConfig(MODALITIES, **{**defaults, **options}), backend="eager")
    model.set_popularity(torch.arange(ITEMS + 1))
    return model


def make_step(cache: HiddenStateCache, device: torch.device = CPU, **options: Any) -> TrainStep:
    model, settings = make_model(**options).to(device), OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    return TrainStep(model, cache, make_optimizer(model, settings), settings)


def draw(rows: int = ROWS, seed: int = 0) -> Tensor:
    ids = torch.randint(1, ITEMS + 1, (rows, 5), generator=torch.Generator().manual_seed(seed))
    ids[: rows // 3, :2] = 0
    return ids


def gradients(model: CrossanModel, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that the cache is not resident on: rows have to be gathered."""
    monkeypatch.setattr(_sources, "read_by_id", lambda cache, device: False)


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("options", [{"load_balance": 0.1}, {"loss": "full", "load_balance": 0.1}])
def test_gathered_rows_give_what_reading_by_id_gives(
    cache: HiddenStateCache, request: pytest.FixtureRequest, options: dict[str, Any], deduplicate: bool
) -> None:
    model = make_model(deduplicate=deduplicate, **options)
    expected, wanted = gradients(model, item_ids=draw(), cache=cache)
    items = model.encode_catalogue(cache, batch_size=7)
    request.getfixturevalue("out_of_reach")
    loss, given = gradients(model, item_ids=draw(), cache=cache)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode_catalogue(cache, batch_size=7), items, rtol=0, atol=0)


def test_the_catalogue_is_gathered_in_chunks(
    cache: HiddenStateCache, out_of_reach: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full softmax holds a chunk's states at a time, and gathers it again for the backward."""
    monkeypatch.setattr("crossan_fast._sources.CATALOGUE_CHUNK", 16)
    sizes: list[int] = []
    whole = HiddenStateCache.gather_stored

    def gather(self: HiddenStateCache, ids: Tensor, *rest: Any) -> Rows:
        sizes.append(len(ids))
        return whole(self, ids, *rest)

    monkeypatch.setattr(HiddenStateCache, "gather_stored", gather)
    gradients(make_model(loss="full"), item_ids=draw(), cache=cache)
    assert sorted(sizes) == [9, 9, 16, 16, 16, 16]


def test_rows_read_ahead_are_used_and_checked(
    cache: HiddenStateCache, out_of_reach: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), draw()
    expected, wanted = gradients(model, item_ids=ids, cache=cache)
    ahead = cache.gather(ops.deduplicate(ids).ids, CPU)
    with pytest.raises(ValueError, match=r"gathered\['text'\]: expected a row for each of \d+ ids"):
        model(ids, cache=cache, gathered={name: rows[:-1] for name, rows in ahead.items()})
    with pytest.raises(ValueError, match="gathered: goes with cache"):
        states = {m.name: torch.zeros(*ids.shape, LEVELS, m.width) for m in MODALITIES}
        model(ids, states=states, gathered=ahead)
    monkeypatch.setattr(HiddenStateCache, "gather_stored", None)
    for rows in (ahead, Rows(ahead)):
        loss, given = gradients(model, item_ids=ids, cache=cache, gathered=rows)
        assert torch.equal(loss, expected)
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_stored_rows_reach_the_op_as_they_are(
    quantized: HiddenStateCache, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Codes and scales, for the op to convert, as it does where it reads a resident cache by id."""
    model, ids = make_model(loss=loss), draw()
    expected, wanted = gradients(model, item_ids=ids, cache=quantized)
    request.getfixturevalue("out_of_reach")
    monkeypatch.setattr(HiddenStateCache, "gather", None)
    ahead = {"gathered": quantized.gather_stored(ops.deduplicate(ids).ids, CPU)} if loss == "in_batch" else {}
    seen = []
    side_network = ops.side_network

    def op(states: list[Tensor], *rest: Any, **options: Any) -> Any:
        seen.append((options["ids"], {state.dtype for state in states}, len(options["scales"])))
        return side_network(states, *rest, **options)

    monkeypatch.setattr("crossan_fast.modules.side_network.side_network", op)
    given_loss, given = gradients(model, item_ids=ids, cache=quantized, **ahead)
    assert seen and all(call == (None, {quantized.dtype}, 2) for call in seen)
    torch.testing.assert_close(given_loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


# -- feed --------------------------------------------------------------------------------------------------


class Elsewhere:
    """A device type that is not the CPU's, for the choice of a feed; tensors stay where they are."""

    type = "cuda"


def test_resident_batches_come_with_slots_that_suffice(cache: HiddenStateCache) -> None:
    batches = Batches(draw(100), 16, seed=0)
    resident = HiddenStateCache.from_tensors(cache.gather(torch.arange(ITEMS + 1)))
    assert resident.tier == "resident"
    fed = list(feed(batches, 1, resident, Elsewhere()))  # type: ignore[arg-type]
    for (item_ids, ahead), wanted in zip(fed, batches.epoch(1), strict=True):
        assert torch.equal(item_ids, wanted)
        needed = ops.deduplicate(item_ids).ids.numel()
        assert needed <= ahead.capacity <= item_ids.numel() + 1
    alike = feed(batches, 1, resident, Elsewhere(), slots=False)  # type: ignore[arg-type]
    assert all(ahead == ReadAhead() for _, ahead in alike)


def test_distinct_counts_are_deduplicates_own() -> None:
    for rank in range(3):
        batches = Batches(draw(50), 8, seed=2, rank=rank, size=3)
        expected = [ops.deduplicate(item_ids).ids.numel() for item_ids in batches.epoch(4)]
        assert batches.distinct(4) == expected


def test_rows_out_of_reach_come_gathered(cache: HiddenStateCache, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HiddenStateCache.prefetch_stored

    def prefetch(self: HiddenStateCache, batches: Iterator[Tensor], device: Any) -> Iterator[Any]:
        return whole(self, batches, CPU)

    monkeypatch.setattr(HiddenStateCache, "prefetch_stored", prefetch)
    monkeypatch.setattr(Tensor, "to", lambda self, *rest, **options: self)
    batches = Batches(draw(60), 16, seed=0)
    fed = list(feed(batches, 1, cache, Elsewhere()))  # type: ignore[arg-type]
    for (item_ids, ahead), wanted in zip(fed, batches.epoch(1), strict=True):
        assert torch.equal(item_ids, wanted)
        expected = cache.gather(ops.deduplicate(item_ids).ids, CPU)
        assert isinstance(ahead.gathered, Rows) and ahead.capacity is None
        assert ahead.gathered.scales is None and ahead.gathered.states.keys() == expected.keys()
        assert all(torch.equal(rows, expected[name]) for name, rows in ahead.gathered.states.items())


def test_pages_of_the_next_batch_are_touched_first(
    cache: HiddenStateCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(HiddenStateCache, "tier", "mmap")
    monkeypatch.setattr(HiddenStateCache, "warm", lambda self: events.append("warm"))
    monkeypatch.setattr(HiddenStateCache, "touch", lambda self, ids: events.append(f"touch {ids.sum()}"))
    batches = Batches(draw(40), 16, seed=0)
    sums = [int(item_ids.sum()) for item_ids in batches.epoch(1)]
    for item_ids, ahead in feed(batches, 1, cache, CPU):
        events.append(f"step {item_ids.sum()}")
        assert ahead == ReadAhead()
    a, b, c = sums
    assert events.pop(0) == "warm"
    assert events == [f"touch {a}", f"touch {b}", f"step {a}", f"touch {c}", f"step {b}", f"step {c}"]


def test_buckets_are_few_and_near() -> None:
    sizes = [bucket(count, 100_000) for count in range(1, 60_000)]
    for count, size in enumerate(sizes, start=1):
        assert count <= size <= max(count + 63, count * 1.125)
    assert len(set(sizes)) < 100
    assert bucket(700, 705) == 704
    assert bucket(705, 705) == 705


# -- graphs ------------------------------------------------------------------------------------------------


class Recorder:
    """Captures like CUDA: records a body without running it; a replay runs it on the buffers it was given.

    One that fails does so like CUDA, too: after the host has gone through the body, whose tensors nothing was
    written to.
    """

    def __init__(self, fails: TrainStep | None = None) -> None:
        self.warmed = self.captured = self.replayed = 0
        self.fails = fails

    def warm(self, body: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return body()

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fails is not None:
            self._invalidate(body, self.fails)
        self.captured += 1
        loss = torch.zeros(())

        def replay() -> None:
            self.replayed += 1
            loss.copy_(body())

        return replay, loss

    def _invalidate(self, body: Callable[[], Tensor], step: TrainStep) -> None:
        states = step.optimizer.state
        kept = {p: {k: v.clone() for k, v in state.items()} for p, state in states.items()}
        values = [parameter.detach().clone() for parameter in step.model.parameters()]
        body()
        for parameter, value in zip(step.model.parameters(), values, strict=True):
            parameter.data.copy_(value)
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        for parameter, state in states.items():
            for name, entry in state.items():
                entry.copy_(kept[parameter][name] if parameter in kept else torch.full_like(entry, torch.nan))
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        except RuntimeError:
            # As the end of the capture does, which raises in its turn.
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


def weights(step: TrainStep) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])


def test_replayed_steps_are_the_eager_steps(cache: HiddenStateCache) -> None:
    """Two shapes in turn, warm-up of the learning rate under way, dropout on."""
    plain, wrapped, recorder = make_step(cache, dropout=0.2), make_step(cache, dropout=0.2), Recorder()
    graphed = GraphedStep(wrapped, recorder, warmup=2)
    batches = [draw(rows, seed) for seed in range(6) for rows in (6, 9)]
    torch.manual_seed(5)
    expected = [plain(item_ids) for item_ids in batches]
    torch.manual_seed(5)
    given = [graphed(item_ids) for item_ids in batches]
    assert torch.equal(torch.stack(given), torch.stack(expected)), "each loss is a copy"
    assert torch.equal(weights(plain), weights(wrapped))
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (4, 2, 8)
    assert wrapped.steps == len(batches)


def test_a_graph_for_each_number_of_slots(cache: HiddenStateCache) -> None:
    recorder = Recorder()
    graphed = GraphedStep(make_step(cache), recorder, warmup=0)
    for capacity in (64, 96, 64, 96, 96):
        graphed(draw(), ReadAhead(capacity=capacity))
    assert (recorder.captured, recorder.replayed) == (2, 5)


def test_gathered_rows_are_never_captured(cache: HiddenStateCache) -> None:
    """They lie elsewhere in every step; a replay would read those of the capture."""
    recorder, plain, wrapped = Recorder(), make_step(cache), make_step(cache)
    graphed = GraphedStep(wrapped, recorder, warmup=0)
    for seed in range(3):
        ids = draw(seed=seed)
        ahead = ReadAhead(gathered=cache.gather_stored(ops.deduplicate(ids).ids, CPU))
        assert torch.equal(graphed(ids, ahead), plain(ids, ahead))
    assert (recorder.warmed, recorder.captured) == (0, 0)


def test_too_many_shapes_run_eagerly(cache: HiddenStateCache) -> None:
    recorder = Recorder()
    graphed = GraphedStep(make_step(cache), recorder, warmup=0, most=2)
    for rows in (3, 4, 5, 6, 3):
        assert torch.isfinite(graphed(draw(rows)))
    assert (recorder.captured, recorder.replayed) == (2, 3)
    assert graphed.step.steps == 5


def test_what_moved_is_captured_anew(cache: HiddenStateCache) -> None:
    recorder, step = Recorder(), make_step(cache)
    graphed = GraphedStep(step, recorder, warmup=0)
    graphed(draw())
    graphed(draw())
    assert recorder.captured == 1
    held = step.model.item_popularity
    step.model.set_popularity(torch.ones(ITEMS + 1))
    assert step.model.item_popularity.data_ptr() != held.data_ptr()
    graphed(draw())
    assert recorder.captured == 2


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_failed_capture_is_said_once_and_leaves_no_trace(cache: HiddenStateCache, warmup: int) -> None:
    """Dropout draws what it would have drawn, and AdamW's first states are not those of the capture."""
    plain, wrapped = make_step(cache, dropout=0.2), make_step(cache, dropout=0.2)
    graphed = GraphedStep(wrapped, Recorder(fails=wrapped), warmup=warmup)
    torch.manual_seed(5)
    expected = [plain(draw(seed=seed)) for seed in range(4)]
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="one kernel at a time: capture failed: operation not permitted"):
        given = [graphed(draw(seed=seed)) for seed in range(4)]
    assert torch.equal(torch.stack(given), torch.stack(expected))
    assert torch.equal(weights(plain), weights(wrapped))
    assert graphed.reason == "capture failed: operation not permitted when stream is capturing"


class Leaking(CudaGraphs):
    """Breaks a capture midway, as an op that waits for the device does."""

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def broken() -> Tensor:
            loss = body()
            loss.item()
            return loss

        return super().capture(broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_broken_capture_on_a_gpu_leaves_no_trace() -> None:
    """The stream, the generator and the allocator are as before; a later capture works."""
    device = torch.device("cuda", 0)
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width) for m in MODALITIES}
    resident = HiddenStateCache.from_tensors({name: state.to(device) for name, state in states.items()})

    def step() -> TrainStep:
        return make_step(resident, device, dropout=0.2)

    plain, wrapped = step(), step()
    graphs = Leaking(device)
    graphed = GraphedStep(wrapped, graphs, warmup=1)
    batches = [draw(seed=seed).to(device) for seed in range(4)]
    torch.cuda.manual_seed(5)
    expected = [plain(item_ids) for item_ids in batches]
    offset = torch.cuda.get_rng_state(device)
    torch.cuda.manual_seed(5)
    stream = torch.cuda.current_stream(device)
    with pytest.warns(UserWarning, match="one kernel at a time: capture failed"):
        given = [graphed(item_ids) for item_ids in batches]
    torch.testing.assert_close(torch.stack(given), torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(plain), weights(wrapped), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cuda.get_rng_state(device), offset)
    assert torch.cuda.current_stream(device) == stream
    replay, loss = CudaGraphs.capture(graphs, lambda: torch.rand(3, device=device).sum())
    replay()
    assert 0 < float(loss) < 3


def test_why_a_step_is_not_captured(cache: HiddenStateCache) -> None:
    step = make_step(cache)
    assert refusal(step) == "graphs need a CUDA device, got cpu"
    step.device = Elsewhere()  # type: ignore[assignment]
    step.cache = HiddenStateCache.from_tensors({"text": torch.zeros(2, LEVELS, 12)})
    assert refusal(step) is None
    step.cache = cache
    assert cache.tier != "resident"
    assert refusal(step) == f"the host gathers rows for each step (cache {cache.tier})"
    step.group = object()  # type: ignore[assignment]
    assert refusal(step) == "gradients are shared between processes while they are being made"


def test_the_learning_rate_follows_a_step_that_was_resumed(cache: HiddenStateCache, tmp_path: Path) -> None:
    step = make_step(cache)
    step.steps = 2
    step(draw())
    rates = [group["lr"] for group in step.optimizer.param_groups]
    assert rates and rates == pytest.approx([1e-2 * 3 / 5] * len(rates), rel=1e-6)
    for _ in range(4):
        step(draw())
    assert {group["lr"] for group in step.optimizer.param_groups} == {1e-2}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("skip", [0, 3])
def test_norms_that_a_gpu_keeps_are_of_the_gradients_type(
    cache: HiddenStateCache, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, skip: int
) -> None:
    """What torch makes by default is the user's, and may have changed since the model was made."""
    model, settings = make_model(), OptimizerConfig(skip_nonfinite=skip)
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        step = TrainStep(model, cache, make_optimizer(model, settings), settings)
        monkeypatch.setattr(step, "device", torch.device("cuda"))  # its judgement, on these tensors' device
        norms = torch.arange(1.0, len(step._parameters) + 1, dtype=torch.float32) / 3
        if skip:
            norms[2] = torch.nan
        step._judge(torch.ones((), dtype=torch.float32), torch.linalg.vector_norm(norms), norms)
    finally:
        torch.set_default_dtype(before)
    assert step._norms.dtype == torch.float32
    torch.testing.assert_close(step._norms, norms, rtol=0, atol=0, equal_nan=True)
