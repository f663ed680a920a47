"""Reading ahead when something goes wrong: files replaced, reads that fail, forks, caches dropped."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crossan_fast.cache import HiddenStateCache, write_cache
from crossan_fast.cache.pages import PageReader
from crossan_fast.cache.tiers import MappedFile

needs_fadvise = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise"
)
WIDTH, ROWS = 3 * 4096, 100


def small_cache(folder: Path) -> HiddenStateCache:
    states = {"text": torch.randn(9, 2, 4), "image": torch.randn(9, 2, 6)}
    for tensor in states.values():
        tensor[0] = 0
    write_cache(folder, states)
    return HiddenStateCache.open(folder)


@pytest.fixture
def reader(tmp_path: Path) -> PageReader:
    (tmp_path / "rows").write_bytes(bytes(WIDTH * ROWS))
    return PageReader([MappedFile(tmp_path / "rows", WIDTH * ROWS)], ROWS)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@needs_fadvise
def test_hints_go_to_the_files_that_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_cache(Path("c"))
    cache = HiddenStateCache.open("c")
    mapped = [(tmp_path / "c" / name).stat().st_ino for name in ("text.states.bin", "image.states.bin")]
    kept = tmp_path / "kept"
    (tmp_path / "c").rename(kept)
    small_cache(tmp_path / "c")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    hinted: list[int] = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, *_: hinted.append(os.fstat(file).st_ino))
    ids = torch.tensor([3])
    cache.touch(ids)
    cache._reader.wait()
    [(_, rows)] = cache.prefetch([ids])
    assert hinted == 2 * mapped
    assert torch.equal(rows["text"], HiddenStateCache.open(kept).gather(ids)["text"])
    assert cache.warm(wait=True)


@needs_fadvise
def test_a_file_system_without_hints_stops_nothing(
    reader: PageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def refuse(file: int, *_: int) -> None:
        refused.append(file)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.posix_fadvise", refuse)
    reader.request(torch.tensor([1, 2]))
    reader.read(torch.tensor([1, 2]))
    reader.wait()  # raises what went wrong in the thread
    assert len(refused) == 2


@needs_fadvise
def test_requests_are_no_longer_than_the_system_serves(
    reader: PageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, start, size, advice: asked.append((start, size)))
    reader.request(torch.tensor([40, 7, *range(39, 9, -1)], dtype=torch.int32))
    reader.request(torch.tensor([], dtype=torch.int64))
    assert max(size for _, size in asked) < 128 << 10
    covered = sorted(byte for start, size in asked for byte in range(start, start + size, 4096))
    assert covered == [*range(7 * WIDTH, 8 * WIDTH, 4096), *range(10 * WIDTH, 41 * WIDTH, 4096)]


def test_what_fails_while_reading_is_raised_by_wait(
    reader: PageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("crossan_fast.cache.pages.mmap.PAGESIZE", 0)  # a slice's step
        assert reader.read_all()
        with pytest.raises(ValueError, match="step"):
            reader.wait()
    with monkeypatch.context() as patched:
        patched.setattr(reader._pool, "submit", _no_thread)
        with pytest.raises(RuntimeError, match="no thread"):
            reader.read_all()
    reader.wait()
    assert reader.read_all()
    reader.wait()


def _no_thread(*_: object) -> None:
    raise RuntimeError("no thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_reads_by_a_thread_of_its_own(reader: PageReader) -> None:
    assert reader.read_all()
    reader.wait()
    reader.read_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and forks do not mix: what is tested
        child = os.fork()
    if child == 0:
        read = False
        try:
            reader.wait()
            reader.read(torch.tensor([3]))
            read = len(reader._last) == 1 and reader.read_all()
            reader.wait()
        finally:
            os._exit(0 if read else 1)
    state = (0, 0)

    def ended() -> bool:
        nonlocal state
        state = os.waitpid(child, os.WNOHANG) if state[0] == 0 else state
        return state[0] == child

    if not within(10, ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert state == (child, 0)
    reader.wait()


def test_pages_taken_back_are_read_again(reader: PageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.read_all()
    reader.wait()
    first = reader._all
    assert reader.read_all() and reader._all is not first
    reader.wait()
    monkeypatch.setattr("crossan_fast.cache.pages.host_memory", lambda: 0)
    assert not reader.read_all() and not reader._have_all


def test_a_dropped_cache_is_not_read_to_its_end(
    reader: PageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = 0

    class Slow:
        """Bytes of a file that never ends, slowly read."""

        def numel(self) -> int:
            return 1 << 60

        def __getitem__(self, part: slice) -> Slow:
            return self

        def amax(self) -> None:
            nonlocal chunks
            chunks += 1
            time.sleep(0.01)

    file = MappedFile(tmp_path / "rows", WIDTH)
    endless, descriptor = PageReader([file], 1), file.descriptor
    monkeypatch.setattr("crossan_fast.cache.pages.host_memory", lambda: 1 << 62)
    monkeypatch.setattr(file, "bytes", Slow(), raising=True)
    assert endless.read_all() and within(5, lambda: chunks > 2)
    monkeypatch.undo()
    gone = weakref.ref(endless)
    del endless, file
    gc.collect()
    assert within(5, lambda: gone() is None)
    done = chunks
    time.sleep(0.05)
    assert chunks == done
    with pytest.raises(OSError):
        os.fstat(descriptor)
