"""Opening, gathering and placing a cache, against plain indexing of the tensors it was written from."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossan_fast._files import write_whole
from crossan_fast.cache import CacheError, CorruptCacheError, HiddenStateCache, write_cache
from crossan_fast.cache.format import CacheMeta, Segment, row_bytes, states_file
from crossan_fast.cache.tiers import choose_tier
from crossan_fast.config import Modality

ITEMS, LEVELS = 23, 3
WIDTHS = {"text": 5, "image": 8}
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_fadvise = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise"
)


def make_states(dtype: torch.dtype = torch.float32, items: int = ITEMS) -> dict[str, Tensor]:
    states = {name: torch.randn(items + 1, LEVELS, width) for name, width in WIDTHS.items()}
    for tensor in states.values():
        tensor[0] = 0
    return {name: tensor.to(dtype) for name, tensor in states.items()}


def make_present(items: int = ITEMS) -> Tensor:
    present = torch.rand(items + 1, len(WIDTHS)) < 0.7
    present[0] = False
    return present


def names_of(items: int = ITEMS) -> list[str]:
    return [f"item-{row}" for row in range(1, items + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    states, present = make_states(dtype), make_present()
    write_cache(tmp_path / "c", states, present=present, item_names=names_of())
    cache = HiddenStateCache.open(tmp_path / "c", verify=True)
    assert cache.modalities == (Modality("text", 5, LEVELS), Modality("image", 8, LEVELS))
    assert (cache.num_items, cache.dtype) == (ITEMS, dtype)
    assert torch.equal(cache.present, present)
    assert list(cache.item_names) == ["", *names_of()]
    rows = cache.gather(torch.arange(ITEMS + 1))
    for column, name in enumerate(WIDTHS):
        kept = torch.where(present[:, column, None, None], states[name], 0)
        assert rows[name].dtype == dtype and torch.equal(rows[name], kept)
        assert torch.equal(cache.states("cpu")[column], kept)
    assert cache.scales("cpu") is None


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, ITEMS), max_size=40),
    index_type=st.sampled_from([torch.int64, torch.int32]),
    strided=st.booleans(),
    tier=st.sampled_from(["mmap", "resident"]),
)
def test_gather_is_indexing(
    shared_cache: tuple[Path, dict[str, Tensor]],
    ids: list[int],
    index_type: torch.dtype,
    strided: bool,
    tier: str,
) -> None:
    folder, states = shared_cache
    cache = HiddenStateCache.open(folder).to("cpu", tier)
    wanted = torch.tensor(ids, dtype=index_type)
    if strided:
        wanted = wanted.repeat_interleave(2)[::2]
    for name, rows in cache.gather(wanted).items():
        assert torch.equal(rows, states[name][wanted.long()])
    assert cache.tier == tier


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("shared") / "c"
    states = make_states()
    write_cache(folder, states, item_names=names_of())
    return folder, states


def test_gather_to_another_dtype(shared_cache: tuple[Path, dict[str, Tensor]]) -> None:
    folder, states = shared_cache
    rows = HiddenStateCache.open(folder).gather(torch.tensor([3, 1]), dtype=torch.bfloat16)
    assert torch.equal(rows["image"], states["image"][[3, 1]].bfloat16())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([1, 24]), IndexError, r"ids: expected rows 0 to 23, got 24"),
        (torch.tensor([-1, 3]), IndexError, r"ids: expected rows 0 to 23, got -1"),
        (
            torch.tensor([1], dtype=torch.int16),
            TypeError,
            r"ids: expected dtype int64, int32, got int16 \[1\]",
        ),
        (torch.tensor([1.0]), TypeError, r"ids: expected dtype int64, int32, got float32"),
        (torch.tensor([[1]]), ValueError, r"ids: expected shape \[n\], got int64 \[1, 1\]"),
        ([1, 2], TypeError, r"ids: expected a tensor \[n\], got list"),
    ],
)
def test_bad_ids(
    shared_cache: tuple[Path, dict[str, Tensor]], ids: Tensor, error: type[Exception], message: str
) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    with pytest.raises(error, match=message):
        cache.gather(ids)
    with pytest.raises(error, match=message):
        list(cache.prefetch([ids]))


def test_names_and_rows_map_both_ways(shared_cache: tuple[Path, dict[str, Tensor]]) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    assert [cache.row_of(name) for name in cache.item_names[1:]] == list(range(1, ITEMS + 1))
    assert cache.rows_of(["item-7", "item-2"]).tolist() == [7, 2]
    with pytest.raises(KeyError, match=r"no item 'item_7' among the cache's 23; did you mean 'item-7'"):
        cache.row_of("item_7")
    with pytest.raises(KeyError, match="no item ''"):
        cache.row_of("")


def test_from_tensors_shares_memory_and_behaves_as_a_folder() -> None:
    states, present = make_states(), make_present()
    cache = HiddenStateCache.from_tensors(states, present, names_of())
    assert cache.states("cpu")[1].data_ptr() == states["image"].data_ptr()
    assert (cache.tier, cache.folder) == ("resident", None)
    assert cache.row_of("item-3") == 3
    assert torch.equal(cache.gather(torch.tensor([5]))["text"], states["text"][[5]])
    unnamed = HiddenStateCache.from_tensors(states)
    assert unnamed.row_of("4") == 4
    assert unnamed.present[1:].all() and not unnamed.present[0].any()
    with pytest.raises(ValueError, match="tier: mmap needs a cache opened from a folder"):
        cache.to("cpu", "mmap")


def test_presence_mask_is_none_where_nothing_is_absent() -> None:
    states = make_states()
    assert HiddenStateCache.from_tensors(states).present_mask("cpu") is None
    present = torch.ones(ITEMS + 1, 2, dtype=torch.bool)
    present[0] = present[4, 1] = False
    mask = HiddenStateCache.from_tensors(states, present).present_mask("cpu")
    assert mask is not None and torch.equal(mask, present)


def test_bare_mask_holds_items_without_any_of_the_modalities() -> None:
    present = torch.ones(ITEMS + 1, 2, dtype=torch.bool)
    present[0] = present[4, 1] = present[5] = False
    cache = HiddenStateCache.from_tensors(make_states(), present)
    for chosen, rows in ((None, [5]), ((1,), [4, 5])):
        mask = cache.bare_mask("cpu", chosen)
        assert mask is not None and mask.nonzero().flatten().tolist() == rows
    present[5, 0] = True
    assert HiddenStateCache.from_tensors(make_states(), present).bare_mask("cpu") is None


def spoiled(name: str, row: int, value: float) -> dict[str, Tensor]:
    states = make_states()
    states[name][row, 1, 2] = value
    return states


@pytest.mark.parametrize("make", [HiddenStateCache.from_tensors, lambda s: write_cache("never", s)])
@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ({}, ValueError, "states: expected at least one modality"),
        (
            spoiled("image", 4, float("nan")),
            ValueError,
            r"states\['image'\]: .*NaN or inf in 1 row, .* row 4 \(item '4'\)",
        ),
        (spoiled("text", 9, float("inf")), ValueError, r"states\['text'\]: .*row 9 \(item '9'\)"),
        (spoiled("text", 0, 1.0), ValueError, r"states\['text'\]: row 0 is padding and must be all zeros"),
        ({"text": torch.zeros(3, 4)}, ValueError, r"states\['text'\]: expected shape .*got float32 \[3, 4\]"),
        (
            {"a": torch.zeros(3, 2, 4), "b": torch.zeros(4, 2, 4)},
            ValueError,
            r"states\['b'\]: expected shape \[3, L, D_b\], got float32 \[4, 2, 4\]",
        ),
        ({"a/b": torch.zeros(3, 2, 4)}, ValueError, r"Modality.name: .*'a/b'"),
        ({"a": [[0.0]]}, TypeError, r"states\['a'\]: expected a tensor"),
    ],
)
def test_bad_states(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: object,
    states: dict[str, Tensor],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        make(states)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_bad_companions_of_states() -> None:
    states = make_states()
    with pytest.raises(ValueError, match=r"present: expected shape \[24, 2\], got bool \[24, 3\]"):
        HiddenStateCache.from_tensors(states, torch.zeros(24, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="present: row 0 is padding"):
        HiddenStateCache.from_tensors(states, torch.ones(24, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="present: expected dtype bool"):
        HiddenStateCache.from_tensors(states, torch.ones(24, 2))
    with pytest.raises(ValueError, match=r"item_names: expected 23 names .* got 3"):
        HiddenStateCache.from_tensors(states, item_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"item_names\[1\]: item 'a' occurs more than once"):
        HiddenStateCache.from_tensors(states, item_names=["a"] * 23)
    with pytest.raises(ValueError, match=r"item_names\[2\]: expected a non-empty string without tabs"):
        HiddenStateCache.from_tensors(states, item_names=["a", "b", "c\td", *"defghijklmnopqrstuvw"])
    with pytest.raises(
        TypeError, match=r"states\['image'\]: expected torch.float32 like the first, got float64"
    ):
        HiddenStateCache.from_tensors({"text": states["text"], "image": states["image"].double()})
    with pytest.raises(TypeError, match=r"states\['text'\]: expected dtype .*got int64"):
        HiddenStateCache.from_tensors({"text": torch.zeros(3, 2, 2, dtype=torch.int64)})


def test_prefetch_yields_every_batch_in_order(shared_cache: tuple[Path, dict[str, Tensor]]) -> None:
    folder, states = shared_cache
    batches = [torch.randint(0, ITEMS + 1, (n,)) for n in (4, 0, 7, 1, 5, 5)]
    for tier in ("mmap", "resident"):
        cache = HiddenStateCache.open(folder).to("cpu", tier)
        got = list(cache.prefetch(iter(batches), depth=2))
        assert [ids.tolist() for ids, _ in got] == [ids.tolist() for ids in batches]
        for ids, rows in got:
            for name in WIDTHS:
                assert torch.equal(rows[name], states[name][ids])


def test_prefetch_raises_an_error_where_it_happened_and_can_be_left_early(
    shared_cache: tuple[Path, dict[str, Tensor]],
) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    endless = cache.prefetch(torch.tensor([row % ITEMS]) for row in iter(int, 1))
    assert next(endless)[0].tolist() == [0]
    endless.close()  # type: ignore[attr-defined]
    failing = cache.prefetch([torch.tensor([1]), torch.tensor([99])], depth=1)
    with pytest.raises(IndexError, match="got 99"):
        list(failing)
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        next(cache.prefetch([], depth=0))


def test_touching_reads_rows_and_changes_nothing(tmp_path: Path) -> None:
    modality = Modality("text", 4096, 3)  # 24 kB a row: several pages
    sparse_cache(tmp_path / "c", modality, 50)
    cache = HiddenStateCache.open(tmp_path / "c", verify="off")
    for _ in range(5):
        cache.touch(torch.tensor([50, 0, 7, 7], dtype=torch.int32))
    cache._reader.wait()
    assert not cache.gather(torch.arange(51))["text"].any()
    with pytest.raises(IndexError, match="ids: expected rows 0 to 50, got 51"):
        cache.touch(torch.tensor([51]))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts page faults through /proc")
@pytest.mark.parametrize("how", ["touch", "warm"])
def test_pages_that_were_read_cause_no_fault_later(tmp_path: Path, how: str) -> None:
    modality = Modality("text", 4096, 3)
    sparse_cache(tmp_path / "c", modality, 400)
    ids = torch.arange(1, 400, 40)

    def faults_of_gathering(how: str | None) -> int:
        cache = HiddenStateCache.open(tmp_path / "c", verify="off")
        if how == "touch":
            cache.touch(ids)
            cache._reader.wait()
        elif how == "warm":
            assert cache.warm(wait=True)
        rows = cache.states("cpu", ids[:0])[0].view(torch.uint8).flatten(1)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for row in ids.tolist():
            assert not rows[row].any()
        after = resource.getrusage(resource.RUSAGE_SELF)
        return after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt

    assert faults_of_gathering(how) < 0.5 * faults_of_gathering(None)


@needs_fadvise
def test_files_larger_than_memory_are_not_read_whole(
    shared_cache: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    monkeypatch.setattr("crossan_fast.cache.pages.host_memory", lambda: cache.nbytes)
    assert not cache.warm(wait=True)
    monkeypatch.setattr("crossan_fast.cache.pages.host_memory", lambda: 2 * cache.nbytes)
    assert cache.warm() and cache.warm(wait=True)
    requested: list[int] = []
    monkeypatch.setattr("os.posix_fadvise", lambda *arguments: requested.append(1))
    cache.touch(torch.tensor([1, 2]))
    list(cache.prefetch([torch.tensor([1, 2])]))
    assert not requested  # all of it is in memory
    assert HiddenStateCache.open(shared_cache[0]).to("cpu", "resident").warm()


@needs_fadvise
def test_rows_read_ahead_are_asked_of_the_disk_exactly(
    shared_cache: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    cache.touch(torch.tensor([5, 2, 3, 5]))
    cache._reader.wait()
    list(cache.prefetch([torch.tensor([4])]))
    sizes = [state[0].numel() * state.element_size() for state in cache.states("cpu")]
    runs = [(row * size, rows * size) for size in sizes for row, rows in ((2, 2), (5, 1))]
    runs += [(4 * size, size) for size in sizes]
    assert asked == [(*run, os.POSIX_FADV_WILLNEED) for run in runs]


def test_tier_is_chosen_by_size_and_says_why() -> None:
    def chosen(size: int, device: torch.device, asked: str = "auto", on_disk: bool = True) -> str:
        placement = choose_tier(size, device, device_free=100, host_free=1000, asked=asked, on_disk=on_disk)
        assert placement.reason
        return placement.tier

    assert [chosen(size, CPU) for size in (50, 51)] == ["resident", "mmap"]
    assert [chosen(size, CUDA) for size in (50, 51, 500, 501)] == ["resident", "pinned", "pinned", "mmap"]
    assert chosen(501, CUDA, on_disk=False) == "resident"
    assert chosen(10, CUDA, asked="mmap") == "mmap"
    with pytest.raises(ValueError, match=r"tier: expected auto, .* got 'residnt'; did you mean 'resident'"):
        chosen(10, CPU, asked="residnt")
    with pytest.raises(ValueError, match="tier: pinned host memory serves CUDA devices only, got device cpu"):
        chosen(10, CPU, asked="pinned")


def test_placing_on_the_cpu(shared_cache: tuple[Path, dict[str, Tensor]]) -> None:
    cache = HiddenStateCache.open(shared_cache[0])
    assert cache.tier == "mmap"
    assert cache.to("cpu") is cache and cache.tier == "resident"
    assert "free on cpu" in cache.tier_reason
    first = cache.states("cpu")[0]
    assert cache.states("cpu")[0] is first
    assert "23 items, text 3×5, image 3×8, fp32, resident on cpu" in repr(cache)
    with pytest.raises(RuntimeError, match="device: nonsense cannot be used"):
        cache.to("nonsense")


def test_a_write_to_what_states_returned_never_reaches_the_file(
    shared_cache: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, states = shared_cache
    HiddenStateCache.open(folder).states("cpu")[0][1] = 7
    assert torch.equal(HiddenStateCache.open(folder, verify=True).states("cpu")[0], states["text"])


def sparse_cache(folder: Path, modality: Modality, items: int) -> None:
    """A cache of zeros that takes no room; the checksum of its states is not theirs."""
    folder.mkdir()
    rows, dtype = items + 1, torch.bfloat16
    sizes = {states_file(modality): rows * row_bytes(modality, dtype), "present.bin": rows, "items.txt": 0}
    for name, size in sizes.items():
        with open(folder / name, "wb") as file:
            file.truncate(size)
    segments = {name: (Segment(size, "0" * 64),) for name, size in sizes.items()}
    for name in ("present.bin", "items.txt"):
        segments[name] = (Segment(sizes[name], hashlib.sha256(bytes(sizes[name])).hexdigest()),)
    meta = CacheMeta(dtype, items, (modality,), segments=segments)
    write_whole(folder / "meta.json", meta.to_json())


def test_large_caches_open_in_milliseconds_and_reach_past_2_to_the_31_elements(tmp_path: Path) -> None:
    modality = Modality("text", 1024, 4)
    items = 2**32 // (4 * 1024) + 5  # 8.6 GB of bf16, more than 2^32 elements
    sparse_cache(tmp_path / "c", modality, items)
    with open(tmp_path / "c" / states_file(modality), "r+b") as file:
        file.seek(items * row_bytes(modality, torch.bfloat16))
        file.write(torch.full((4, 1024), 3.0, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        cache = HiddenStateCache.open(tmp_path / "c")
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.1
    cache = HiddenStateCache.open(tmp_path / "c", verify="off")
    rows = cache.gather(torch.tensor([items, items - 1, items]))["text"]
    assert (rows[0] == 3).all() and (rows[1] == 0).all() and (rows[2] == 3).all()
    with pytest.raises(CorruptCacheError, match=r"items.txt: expected .* lines"):
        cache.row_of("x")


def test_folders_that_are_no_cache(tmp_path: Path, shared_cache: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: no such cache folder: .*nowhere"):
        HiddenStateCache.open(tmp_path / "nowhere")
    with pytest.raises(CacheError, match=r"is not a cache: it has no meta.json"):
        HiddenStateCache.open(tmp_path)
    (tmp_path / "meta.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptCacheError, match=r"not a cache's meta.json"):
        HiddenStateCache.open(tmp_path)
    text = (shared_cache[0] / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(text.replace('"version": 2', '"version": 4'))
    with pytest.raises(CacheError, match="expected format version 3 or before, got 4"):
        HiddenStateCache.open(tmp_path)
    (tmp_path / "meta.json").write_text(text.replace('"num_items": 23', '"num_items": 22'))
    with pytest.raises(CorruptCacheError, match="its checksum does not fit its content"):
        HiddenStateCache.open(tmp_path)
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(CorruptCacheError, match=r"expected .* bytes, got no such file"):
        HiddenStateCache.open(tmp_path)


def test_a_nan_that_reached_the_file_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", make_states(), item_names=names_of())
    with open(tmp_path / "c" / "image.states.bin", "r+b") as file:
        file.seek(row_bytes(Modality("image", 8, LEVELS), torch.float32) * 6)
        file.write(torch.tensor([float("nan")]).numpy().tobytes())
    with pytest.raises(ValueError, match=r"states\['image'\]: .*row 6 \(item 'item-6'\)"):
        HiddenStateCache.open(tmp_path / "c", verify="off").to("cpu", "resident")


def test_reading_a_cache_needs_no_encoder_library() -> None:
    script = "import sys, crossan_fast.cache as c; print({'transformers', 'PIL', 'scipy'} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "set()"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["resident", "pinned", "mmap"])
def test_tiers_on_a_gpu(shared_cache: tuple[Path, dict[str, Tensor]], tier: str) -> None:
    folder, states = shared_cache
    cache = HiddenStateCache.open(folder).to("cuda", tier)
    batches = [torch.randint(0, ITEMS + 1, (n,)) for n in (4, 0, 7, 1)]
    for ids, rows in cache.prefetch(batches):
        for name in WIDTHS:
            assert rows[name].device == CUDA
            assert torch.equal(rows[name].cpu(), states[name][ids])
            assert torch.equal(cache.gather(ids.cuda())[name].cpu(), states[name][ids])
    if tier == "resident":
        assert all(tensor.device == CUDA for tensor in cache.states("cuda"))
    else:
        with pytest.raises(RuntimeError, match=f"the states are not resident on cuda:0 but {tier}"):
            cache.states("cuda")
