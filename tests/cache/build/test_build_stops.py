"""Builds that were stopped or killed, and builds that add to a cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_building import build, count_encodings, files_of, specs_of, subset
from torch import Tensor

from crossan_fast.cache import (
    CacheError,
    HiddenStateCache,
    IncompleteCacheError,
    build_cache,
    verify_cache,
)
from crossan_fast.cache.build.encoders import FrozenEncoder
from crossan_fast.cache.folders import locked
from crossan_fast.data.items import ItemTable


def test_a_stopped_build_goes_on_and_ends_as_if_never_stopped(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities = specs_of(encoders)[:2]
    build(items, modalities, tmp_path / "whole")
    encoded: list[int] = []
    states = FrozenEncoder.states

    def failing(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        if len(encoded) == 5:  # four batches of text, one of images
            raise KeyboardInterrupt
        encoded.append(len(inputs))
        return states(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "states", failing)
        with pytest.raises(KeyboardInterrupt):
            build(items, modalities, tmp_path / "c")
    assert sum(encoded) == 14 + 4
    with pytest.raises(
        IncompleteCacheError, match=r"half-built cache \(18 of 28 encodings done\); run the same"
    ):
        HiddenStateCache.open(tmp_path / "c")
    with pytest.raises(CacheError, match=r"the build that was stopped in .* had other modalities; go on"):
        build(items, modalities[:1], tmp_path / "c")
    with pytest.raises(CacheError, match="had other settings"):
        build(items, modalities, tmp_path / "c", dtype="bf16")
    with pytest.raises(CacheError, match="had other items"):
        build(subset(items, [*range(13), 13], title={3: "changed"}), modalities, tmp_path / "c")

    def counted(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        encoded.append(len(inputs))
        return states(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "states", counted)
    assert build(items, modalities, tmp_path / "c").added == 14
    assert sum(encoded) == 28
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from crossan_fast.cache import build_cache
from crossan_fast.cache.build.encoders import FrozenEncoder
from crossan_fast.data.items import ItemTable

states, calls = FrozenEncoder.states, []

def killed(self, inputs):
    calls.append(None)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return states(self, inputs)

FrozenEncoder.states = killed
titles = [f"lamp {'red ' * k}" for k in range(12)]
table = ItemTable([f"i{k}" for k in range(12)], {"title": titles}, Path("."))
spec = f"text={sys.argv[1]}:levels=3"
build_cache(table, [spec], sys.argv[2], batch_size=2, progress=False, journal_every=0)
"""


@pytest.mark.slow
def test_a_killed_build_goes_on(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, str(encoders["bert"]), str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(IncompleteCacheError, match="6 of 12 encodings done"):
        HiddenStateCache.open(tmp_path / "c")
    encoded = count_encodings(monkeypatch)
    titles: list[str | None] = [f"lamp {'red ' * k}" for k in range(12)]
    table = ItemTable([f"i{k}" for k in range(12)], {"title": titles}, Path())
    specs = [f"text={encoders['bert']}:levels=3"]
    for folder in ("c", "whole"):
        build_cache(table, specs, tmp_path / folder, batch_size=2, progress=False)
    assert sum(encoded) == 6 + 12
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_new_items_are_appended_and_old_rows_stay(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    modalities = specs_of(encoders)[:2]
    folder = tmp_path / "c"
    build(subset(items, list(range(9))), modalities, folder)
    old = HiddenStateCache.open(folder)
    held = [tensor.clone() for tensor in old.states("cpu")]
    # Another order, new items between old ones, three old ones left out.
    later = subset(items, [12, 3, 2, 13, 0, 9, 1, 10, 5, 11, 6])
    report = build(later, None, folder, dtype=None)
    assert (report.num_items, report.added, report.not_listed, report.unchanged) == (14, 5, 3, 6)
    cache = HiddenStateCache.open(folder, verify=True)
    assert list(cache.item_names[1:]) == [*items.names[:9], "item12", "item13", "item9", "item10", "item11"]
    for before, now in zip(held, cache.states("cpu"), strict=True):
        assert torch.equal(before, now[:10])
    build(items, modalities, tmp_path / "whole")
    whole = HiddenStateCache.open(tmp_path / "whole")
    rows = cache.gather(cache.rows_of(items.names))
    for name, truth in whole.gather(whole.rows_of(items.names)).items():
        torch.testing.assert_close(rows[name], truth, rtol=1e-5, atol=2e-6)
    assert build(items, modalities, folder).added == 0


def test_appending_must_fit_what_is_there(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path
) -> None:
    text = f"text={encoders['bert']}:levels=3"
    folder = tmp_path / "c"
    build(subset(items, [0, 1, 2]), [text], folder)
    before = files_of(folder)
    for modalities, options, message in (
        ([text], {"dtype": "bf16"}, "was built with dtype fp32, not bf16"),
        ([text + ":pool=cls"], {}, "text: pool 'mean', not 'cls'"),
        ([text], {"max_length": 12}, "text: max_length 30, not 12"),
        ([text, f"more={encoders['bert']}:levels=3"], {}, r"modalities \['text 3×32'\], not"),
    ):
        with pytest.raises(CacheError, match=message):
            build(items, modalities, folder, **options)  # type: ignore[arg-type]
    other = tmp_path / "other"
    other.mkdir()
    import transformers

    model = transformers.AutoModel.from_pretrained(encoders["bert"])
    model.embeddings.word_embeddings.weight.data[7, 3] += 1e-3
    model.save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(encoders["bert"]).save_pretrained(other)
    with pytest.raises(CacheError, match="the encoder's weights differ from those that made the rows"):
        build(items, [f"text={other}:levels=3"], folder)
    HiddenStateCache.open(folder, verify=True)
    assert {name: data for name, data in files_of(folder).items() if name == "meta.json"} == {
        "meta.json": before["meta.json"]
    }
    assert build(items, [text], folder, restart=True).added == 11
    assert verify_cache(folder) == []


def test_a_stopped_build_with_nothing_done_binds_nobody(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: FrozenEncoder, inputs: list[Tensor]) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "states", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(items, specs_of(encoders)[:1], tmp_path / "c")
    assert build(items, specs_of(encoders)[1:2], tmp_path / "c").added == 14
    assert [m.name for m in HiddenStateCache.open(tmp_path / "c", verify=True).modalities] == ["image"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_while_appending(
    encoders: dict[str, Path], items: ItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    text = [f"text={encoders['bert']}:levels=3"]
    folder = tmp_path / "c"
    build(subset(items, [0, 1, 2]), text, folder)
    before = HiddenStateCache.open(folder).states("cpu")[0].clone()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"No space|no room"):
            build(items, text, folder)
    cache = HiddenStateCache.open(folder, verify=True)
    assert cache.num_items == 3 and torch.equal(cache.states("cpu")[0], before)
    assert build(items, text, folder).added == 11
    assert HiddenStateCache.open(folder, verify=True).num_items == 14


def test_one_writer_at_a_time(encoders: dict[str, Path], items: ItemTable, tmp_path: Path) -> None:
    with locked(tmp_path / "c"), pytest.raises(BlockingIOError, match="another process is writing to"):
        build(items, [f"text={encoders['bert']}:levels=3"], tmp_path / "c")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_names_may_hold_what_only_looks_like_a_line_break(tmp_path: Path, mark: str) -> None:
    names = [f"a{mark}b", "c", f"d{mark}"]
    states = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    states[0] = np.nan
    for count in (2, 3):  # the second build appends, and reads what the first has written
        np.save(tmp_path / "states.npy", states[:count])
        table = ItemTable(names[:count], {}, tmp_path)
        spec = f"audio={tmp_path / 'states.npy'}:precomputed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            build(table, [spec], tmp_path / "c")
    assert list(HiddenStateCache.open(tmp_path / "c", verify=True).item_names[1:]) == names
    lines = (tmp_path / "c" / "report.tsv").read_bytes().decode().split("\n")
    assert [line.split("\t")[:2] for line in lines[1:-1]] == [[names[0], "audio"]]
    (tmp_path / "c" / "report.tsv").write_bytes(b"edited by hand\r\nx\xff\ty\n")
    np.save(tmp_path / "states.npy", states[[0, 1, 2, 2]])
    assert build(ItemTable([*names, "e"], {}, tmp_path), [spec], tmp_path / "c").added == 1
