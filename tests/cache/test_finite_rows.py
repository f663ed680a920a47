"""A NaN in a cache's files is found before any use of its row, on every road that rows take to an op."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality, _sources
from crossan_fast.cache import checked as checked_module
from crossan_fast.cache import validate
from crossan_fast.cache.format import scales_file, states_file
from crossan_fast.cache.writer import write_cache

ITEMS, LEVELS, BAD_ROW, BAD_LEVEL = 40, 3, 17, 2
MODALITIES = (Modality("text", 12, LEVELS), Modality("image", 20, LEVELS))
SOUND_IDS, BAD_IDS = torch.tensor([0, 3, 9, 3]), torch.tensor([5, BAD_ROW])
MESSAGE = rf"\['image'\]: expected finite values, got NaN or inf in 1 row, first in row {BAD_ROW} "
MESSAGE += rf"\(item 'n{BAD_ROW}'\), level {BAD_LEVEL}; `crossan-fast cache verify "

# By storage type, what stands for NaN or inf there.
POISONS: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: (math.nan, math.inf, -math.inf),
    torch.float16: (math.nan, math.inf),
    torch.bfloat16: (math.nan, -math.inf),
    torch.float8_e4m3fn: (math.nan,),
}


def poisoned(folder: Path, dtype: torch.dtype, value: float = math.nan, what: str = "states") -> Path:
    """A cache whose file was damaged in one place after it was written."""
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width) for m in MODALITIES}
    for state in states.values():
        state[0] = 0
    names = [f"n{row}" for row in range(1, ITEMS + 1)]
    write_cache(folder / "cache", states, item_names=names, dtype=dtype)
    image = MODALITIES[1]
    file, width = (states_file(image), image.width) if what == "states" else (scales_file(image), 1)
    one = torch.tensor([value], dtype=dtype if what == "states" else torch.float32)
    with open(folder / "cache" / file, "r+b") as stream:
        stream.seek(((BAD_ROW * LEVELS + BAD_LEVEL) * width + width // 2) * one.element_size())
        stream.write(one.view(torch.uint8).numpy().tobytes())
    return folder / "cache"


def opened(folder: Path) -> HiddenStateCache:
    """Without comparing checksums, which would find this damage first; a NaN may also have one that fits."""
    return HiddenStateCache.open(folder, verify="off")


def model_of(**options: object) -> CrossanModel:
    options = {"bottleneck": 4, "embedding_dim": 8, "window": 4, **options}
    model = CrossanModel(CrossanConfig(MODALITIES, **options), backend="eager")  # type: ignore[arg-type]
    model.set_popularity(torch.ones(ITEMS + 1))
    return model


def train_on(cache: HiddenStateCache, ids: Tensor) -> None:
    others = torch.tensor([[30, 31], [32, 33]])
    model_of()(torch.cat([ids[-2:][None], others]), cache=cache).loss.backward()


ROADS: dict[str, Callable[[HiddenStateCache, Tensor], object]] = {
    "gather": lambda cache, ids: cache.gather(ids),
    "gather_stored": lambda cache, ids: cache.gather_stored(ids.to(torch.int32)),
    "prefetch": lambda cache, ids: list(cache.prefetch([ids])),
    "prefetch_stored": lambda cache, ids: list(cache.prefetch_stored([ids])),
    "states": lambda cache, ids: cache.states("cpu", ids),
    "scales": lambda cache, ids: cache.scales("cpu", ids),
    "training": train_on,
    "catalogue": lambda cache, ids: model_of().encode_catalogue(cache, ids=ids),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", POISONS)
def test_a_row_is_checked_before_its_first_use(tmp_path: Path, road: str, dtype: torch.dtype) -> None:
    for number, value in enumerate(POISONS[dtype]):
        cache = opened(poisoned(tmp_path / str(number), dtype, value))
        ROADS[road](cache, SOUND_IDS)
        for _ in range(2):  # a row that was refused once is refused again
            with pytest.raises(ValueError, match="^states" + MESSAGE):
                ROADS[road](cache, BAD_IDS)
        ROADS[road](cache, SOUND_IDS)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_are_checked_like_states(tmp_path: Path, road: str, dtype: torch.dtype) -> None:
    cache = opened(poisoned(tmp_path, dtype, what="scales"))
    ROADS[road](cache, SOUND_IDS)
    with pytest.raises(ValueError, match="^scales" + MESSAGE):
        ROADS[road](cache, BAD_IDS)


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_rows_that_are_gathered_for_the_op_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """As on a GPU that the cache is not resident on."""
    monkeypatch.setattr(_sources, "read_by_id", lambda cache, device: False)
    cache = opened(poisoned(tmp_path, torch.float32))
    with pytest.raises(ValueError, match=MESSAGE):
        model_of(loss=loss)(torch.tensor([[1, BAD_ROW], [2, 3]]), cache=cache)


@pytest.mark.parametrize(
    "read_whole",
    [
        lambda cache: cache.to("cpu", "resident"),
        lambda cache: cache.warm(wait=True),
        lambda cache: cache.states("cpu"),
        lambda cache: model_of().encode_catalogue(cache),
        lambda cache: model_of(loss="full")(torch.tensor([[1, 2]]), cache=cache),
    ],
    ids=["resident", "warm", "states", "catalogue", "full"],
)
@pytest.mark.parametrize("dtype", POISONS)
def test_files_that_are_read_whole_are_checked(
    tmp_path: Path, read_whole: Callable[[HiddenStateCache], object], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        read_whole(opened(poisoned(tmp_path, dtype)))


def test_a_row_is_read_once_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    whole = checked_module.reject_nonfinite

    def reject(
        block: Tensor, name: str, *rest: object, rows: Tensor | None = None, **options: object
    ) -> None:
        if name == "text":
            looked.extend([] if rows is None else rows.tolist())
        whole(block, name, *rest, rows=rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checked_module, "reject_nonfinite", reject)
    cache = opened(poisoned(tmp_path, torch.float16))
    cache.gather(torch.tensor([3, 9]))
    cache.states("cpu", torch.tensor([9, 3, 4]))
    cache.gather(torch.tensor([4, 3]))
    assert looked == [3, 9, 4]


def test_what_was_read_whole_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = poisoned(tmp_path, torch.float16, value=1.0)
    for read_whole in (
        lambda c: c.warm(wait=True),
        lambda c: c.to("cpu", "resident"),
        lambda c: c.states("cpu"),
    ):
        cache = opened(folder)
        read_whole(cache)
        with monkeypatch.context() as patch:
            patch.setattr(checked_module, "reject_nonfinite", None)
            cache.gather(torch.arange(ITEMS + 1))
            cache.states("cpu")


def test_opening_reads_no_row(tmp_path: Path) -> None:
    cache = opened(poisoned(tmp_path, torch.float16))
    assert cache.touch(BAD_IDS) is None and cache.warm() is True


# -- states as tensors -------------------------------------------------------------------------------------


def tensors(*leading: int) -> dict[str, Tensor]:
    return {m.name: torch.randn(*leading, LEVELS, m.width) for m in MODALITIES}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dense_states_are_checked(dtype: torch.dtype, value: float) -> None:
    model, ids = model_of(), torch.tensor([[0, 4, 5], [6, 7, 8]])
    states = {name: state.to(dtype) for name, state in tensors(2, 3).items()}
    model(ids, states)
    states["image"][1, 2, BAD_LEVEL, 3] = value
    message = r"states\['image'\]: expected finite values, got NaN or inf in 1 item, first "
    with pytest.raises(ValueError, match=message + rf"that of item 8, level {BAD_LEVEL}$"):
        model(ids, states)
    with pytest.raises(ValueError, match=message + rf"in row 5, level {BAD_LEVEL}$"):
        model.encode_items({name: state.flatten(0, 1) for name, state in states.items()})


def test_what_is_absent_may_hold_anything() -> None:
    model, states = model_of(), tensors(4)
    present = torch.ones(4, 2, dtype=torch.bool)
    present[2, 0] = False
    expected = model.encode_items(states, present)
    states["text"][2] = math.nan
    assert torch.equal(model.encode_items(states, present), expected)
    ids, placed = (
        torch.tensor([[1, 2], [3, 4]]),
        {name: s.reshape(2, 2, *s.shape[1:]) for name, s in states.items()},
    )
    assert model(ids, placed, present=present.reshape(2, 2, 2)).loss.isfinite()


# -- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["towers.image.up.weight", "item_popularity"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, name: str) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "sound")
    place = model.state_dict()[name]
    place.view(-1)[-1] = math.nan
    where = [size - 1 for size in place.shape]
    message = (
        rf"^{name}: expected finite values to save, got nan at \[{', '.join(map(str, where))}\], in 1 of "
    )
    for folder in (tmp_path / "new", tmp_path / "sound"):
        before = {path: path.read_bytes() for path in folder.glob("*")}
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(folder)
        assert {path: path.read_bytes() for path in folder.glob("*")} == before, "nothing is written"


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", (*validate.FLOATS, torch.float8_e4m3fn, torch.int8))
def test_numpy_finds_what_torch_finds(dtype: torch.dtype, bad: float | None) -> None:
    values = torch.randn(40, 3, 5).clamp(-448, 448) * 20
    if bad is not None:
        values[7, 1, 2] = bad
    block = (values.nan_to_num(0, 0, 0) if dtype == torch.int8 else values).to(dtype)
    assert validate.all_finite_alone(block) == (not validate.nonfinite_rows(block).any())
    if dtype != torch.int8:
        top = torch.finfo(dtype).max
        assert validate.all_finite_alone(torch.tensor([top, -top, 0.0], dtype=torch.float64).to(dtype))
