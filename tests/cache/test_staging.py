"""The staging ring, with a transport whose copies come as late as they may; on a GPU, the whole way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossan_fast import _build
from crossan_fast.cache import HiddenStateCache, write_cache
from crossan_fast.cache.quantize import dequantize, quantize
from crossan_fast.cache.staging import StagingRing, as_floats, read_rows


class _Late:
    """Copies when it is waited for, and not before: a buffer written too early arrives spoiled."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.under_way: list[_Copy] = []

    def allocate(self, size: int) -> Tensor:
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def send(self, buffer: Tensor) -> tuple[Tensor, _Copy]:
        self.under_way.append(_Copy(buffer, torch.full_like(buffer, 255)))
        return self.under_way[-1].target, self.under_way[-1]


class _Copy:
    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.source, self.target, self.done = source, target, False

    def synchronize(self) -> None:
        if not self.done:
            self.target.copy_(self.source)
        self.done = True


def _sources() -> list[Tensor]:
    codes, scales = quantize(torch.randn(50, 3, 8), torch.float8_e4m3fn)
    return [torch.randn(50, 2, 16).bfloat16(), codes, scales, torch.randn(50, 5)]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_rows_arrive_however_late_the_copies_are(slots: int) -> None:
    transport, sources = _Late(), _sources()
    ring = StagingRing(transport, slots)
    batches = [torch.randint(0, 50, (count,)) for count in (7, 9, 1, 0, 30, 2, 31, 8)]
    moved = [ring.move(sources, rows) for rows in batches]
    # A slot waits for its own last copy, and for no other.
    assert [copy.done for copy in transport.under_way] == [True] * (8 - slots) + [False] * slots
    for copy in transport.under_way:
        copy.synchronize()
    for rows, got in zip(batches, moved, strict=True):
        for source, found in zip(sources, got, strict=True):
            assert found.dtype == source.dtype and found.shape == (len(rows), *source.shape[1:])
            assert torch.equal(found.view(torch.uint8), source.view(torch.uint8)[rows])


def test_buffers_are_kept_while_they_are_large_enough() -> None:
    transport = _Late()
    ring = StagingRing(transport, 2)
    for count in (40, 40, 45, 3, 48, 20):
        ring.move([torch.zeros(50, 64)], torch.arange(count))
    assert len(transport.allocated) == 2  # a quarter more than asked for


def test_a_ring_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots: expected at least 1, got 0"):
        StagingRing(_Late(), 0)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_floats_of_what_arrived(dtype: torch.dtype | None) -> None:
    states = torch.randn(6, 3, 8)
    codes, scales = quantize(states, torch.int8)
    want = dequantize(codes, scales, dtype or torch.float32)
    assert torch.equal(as_floats(codes, scales, dtype), want)
    assert as_floats(states, None, dtype).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_ring_brings_what_a_plain_gather_does(quantized: bool) -> None:
    states = [torch.randn(20, 2, 8), torch.randn(20, 3, 4)]
    scales, cpu = None, torch.device("cpu")
    if quantized:
        states, scales = map(list, zip(*(quantize(s, torch.int8) for s in states), strict=True))
    transport, ids = _Late(), torch.tensor([3, 0, 19, 3])
    transport.send = lambda buffer: (buffer.clone(), _Copy(buffer, buffer))  # type: ignore[method-assign]
    plain = read_rows(states, scales, ids, cpu, None)
    staged = read_rows(states, scales, ids, cpu, None, StagingRing(transport))
    for state, one, other in zip(states, plain, staged, strict=True):
        assert one.shape == (4, *state.shape[1:]) and torch.equal(one, other)


def test_a_pinned_cache_is_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is asked for, with a page-locked tensor's stand-in."""
    asked = []

    def kernel(states: Tensor, scales: Tensor | None, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        asked.append((states.dtype, scales is not None, ids, dtype))
        return torch.empty(0)

    monkeypatch.setattr("crossan_fast.cache.staging.gather_kernel", lambda device: kernel)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    codes, scales = quantize(torch.randn(5, 2, 8), torch.int8)
    ids, cpu = torch.tensor([1, 4]), torch.device("cpu")
    read_rows([torch.randn(5, 2, 8).half()], None, ids, cpu, None)
    read_rows([codes], [scales], ids, cpu, None)
    read_rows([codes], [scales], ids, cpu, torch.bfloat16)
    assert asked == [
        (torch.float16, False, ids, torch.float16),
        (torch.int8, True, ids, torch.float32),
        (torch.int8, True, ids, torch.bfloat16),
    ]
    wide = read_rows([torch.arange(10.0).double().view(5, 2, 1)], None, ids, cpu, None)
    assert len(asked) == 3 and wide[0].flatten().tolist() == [2, 3, 8, 9]  # no kernel for float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("tier", ["mmap", "pinned"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_prefetch_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, tier: str, kernels: bool
) -> None:
    if kernels and (problem := _build.problem("cuda")):
        pytest.fail(f"a GPU is here, but the CUDA part cannot be built: {problem}")
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "cuda" if kernels else "auto")
    states = {"text": torch.randn(300, 3, 64), "image": torch.randn(300, 3, 128)}
    for tensor in states.values():
        tensor[0] = 0
    write_cache(tmp_path / "cache", states, dtype=getattr(torch, stored))
    cache = HiddenStateCache.open(tmp_path / "cache")
    batches = [torch.randint(0, 300, (count,)) for count in (5, 200, 1, 90, 250, 7)]
    want = [cache.gather(ids, "cpu") for ids in batches]
    cache.to("cuda", tier)
    seen = 0
    for (ids, rows), batch, expected in zip(cache.prefetch(batches), batches, want, strict=True):
        assert torch.equal(ids, batch)
        for name, tensor in rows.items():
            assert tensor.is_cuda and torch.equal(tensor.cpu(), expected[name])
        seen += 1
    assert seen == len(batches)
