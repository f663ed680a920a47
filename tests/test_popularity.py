"""A model's popularity meets caches: the same rows, grown ones, others, and those that nobody named."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.data import Catalogue, build_interactions, leave_one_out

ITEMS, GROWN, LEVELS = 12, 15, 2
NAMES = [f"item{i}" for i in range(1, GROWN + 1)]
IDS = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9], [0, 5, 1, 12, 2]])
SEQUENCES = {"u": NAMES[2:8], "v": NAMES[5:11], "w": NAMES[3:9]}


def make_cache(items=ITEMS, names=NAMES, absent=False):
    states = torch.randn(GROWN + 1, LEVELS, 8, generator=torch.Generator().manual_seed(3))[: items + 1]
    states[0] = 0
    states = {"text": states, "image": states.flip(2).contiguous()}
    present = torch.ones(items + 1, 2, dtype=torch.bool)
    present[0] = False
    if absent:
        present[4, 1] = False
    return HiddenStateCache.from_tensors(states, present, names[:items])


def make_model(loss="in_batch", **options):
    torch.manual_seed(1)
    config = CrossanConfig(
        [Modality("text", 8, LEVELS), Modality("image", 8, LEVELS)],
        embedding_dim=8,
        bottleneck=4,
        window=4,
        dropout=0.0,
        loss=loss,
        **options,
    )
    return CrossanModel(config)


def split_of(cache, **options):
    return leave_one_out(build_interactions(SEQUENCES, cache.item_names, **options), 4)


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_rows_of_another_numbering_are_refused(loss):
    """As `catalogue='used'` numbers them, where the cache holds an item that no user took."""
    model, cache = make_model(loss), make_cache()
    split = split_of(cache, catalogue="used")
    model.set_popularity(split)
    message = r"item_popularity: .* of 9 items, the cache has 12; row 1 is 'item3' there and 'item1' in the"
    with pytest.raises(ValueError, match=message):
        model(split.train, cache=cache)
    model.set_popularity(split_of(cache))
    assert torch.isfinite(model(split_of(cache).train, cache=cache).loss)
    renamed = make_cache(names=[NAMES[1], NAMES[0], *NAMES[2:]])
    with pytest.raises(ValueError, match=r"row 1 is 'item1' there and 'item2' in the cache"):
        model(IDS, cache=renamed)


def copies(model, folder):
    """The model by every road on which one travels."""
    model.save_pretrained(folder)
    yield CrossanModel.from_pretrained(folder)
    other = make_model(model.config.loss)
    other.load_state_dict(model.state_dict())
    yield other
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make_model(model.config.loss)
    other.set_popularity([0, 1, 1])
    other.load_state_dict(torch.load(file))
    yield other


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_the_catalogue_goes_where_the_model_goes(loss, tmp_path):
    model, cache = make_model(loss), make_cache()
    model.set_popularity(split_of(cache))
    expected = model(IDS, cache=cache).loss
    for other in copies(model, tmp_path / "model"):
        assert other.catalogue == cache.catalogue
        assert torch.equal(other(IDS, cache=cache).loss, expected)
        with pytest.raises(ValueError, match="item_popularity: its rows are of 12 items, the cache has 15"):
            other(IDS, cache=make_cache(GROWN, names=NAMES[::-1]))
        with pytest.raises(ValueError, match="item_popularity: its rows are of 12 items, the cache has 5"):
            other(IDS.clamp_max(5), cache=make_cache(5))


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"loss": "in_batch"}, {"loss": "full", "modality_dropout": 0.4}, {"loss": "full", "deduplicate": False}],
    ids=["in_batch", "full", "by place"],
)
def test_a_grown_cache_gives_the_loss_that_it_gave(options, absent, tmp_path):
    model, cache, grown = make_model(**options), make_cache(absent=absent), make_cache(GROWN, absent=absent)
    model.set_popularity(split_of(cache))
    model.save_pretrained(tmp_path)
    loaded = CrossanModel.from_pretrained(tmp_path)
    results = []
    for held in (cache, grown):
        torch.manual_seed(5)
        loaded.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = loaded(IDS, cache=held).loss
            torch.manual_seed(5)
            assert torch.equal(loaded(IDS, cache=held).loss, loss)
        said = [str(w.message) for w in caught if "grown" in str(w.message)]
        assert len(said) == (held is grown), "once"
        loss.backward()
        results.append([loss, *(p.grad for p in loaded.parameters() if p.grad is not None)])
    assert "grown to 15 items; the model trains on the 12 that its popularity knows" in said[0]
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="expected ids in 0 to 12, the rows of item_popularity, got 0 to 13"):
        loaded(torch.where(IDS == 9, 13, IDS), cache=grown)
    loaded.set_popularity(split_of(grown))
    assert torch.isfinite(loaded(torch.where(IDS == 9, 13, IDS), cache=grown).loss)


def test_counts_without_names_fit_a_cache_of_their_size_alone():
    model, cache = make_model(), make_cache()
    model.set_popularity(torch.arange(ITEMS + 1))
    assert model.catalogue is None
    assert torch.isfinite(model(IDS, cache=cache).loss)
    for items in (ITEMS - 3, GROWN):
        message = f"item_popularity: expected a share for each of the cache's {items} items, got 12 of an unk"
        with pytest.raises(ValueError, match=message):
            model(IDS.clamp_max(5), cache=make_cache(items))
    states = {name: cache.gather(IDS.flatten())[name].unflatten(0, IDS.shape) for name in ("text", "image")}
    assert torch.isfinite(model(IDS, states=states).loss)
    model.set_popularity(torch.arange(6))
    with pytest.raises(ValueError, match="expected ids in 0 to 5, the rows of item_popularity, got 0 to 12"):
        model(IDS, states=states)


def test_counts_may_be_named():
    model, cache = make_model(), make_cache()
    model.set_popularity(torch.arange(ITEMS + 1), cache.catalogue)
    assert model.catalogue == cache.catalogue
    with pytest.raises(ValueError, match=r"counts: expected \[13\] for Catalogue\(12 items, .* got .* \[3\]"):
        model.set_popularity([0, 1, 2], cache.catalogue)
    with pytest.raises(ValueError, match="catalogue: goes with plain counts"):
        model.set_popularity(split_of(cache), cache.catalogue)
    model.set_popularity([0, 1, 2])
    assert model.catalogue is None and model.catalogue_digest.numel() == 0


def test_shares_in_place_of_counts_are_refused():
    model = make_model()
    with pytest.raises(
        ValueError, match=r"counts of interactions, got values below 1 \(at most 0\.5\), such"
    ):
        model.set_popularity(torch.tensor([0, 0.25, 0.5, 0.25, 0]))
    with pytest.raises(ValueError, match="counts: expected at least one interaction, got none"):
        model.set_popularity(torch.zeros(5))


def test_fractional_counts_keep_their_shares_and_whole_ones_are_as_they_were():
    model = make_model()
    model.set_popularity(torch.tensor([9, 0.5, 0.25, 3.25, 0], dtype=torch.float64))
    assert model.item_popularity.tolist() == [1, 0.125, 0.0625, 0.8125, 0.0625]
    model.set_popularity(torch.tensor([0, 1.5, 2.5, 0]))
    assert model.item_popularity.tolist() == [1, 0.375, 0.625, 0.25]
    model.set_popularity([5, 7, 0, 1, 3])
    assert torch.equal(model.item_popularity, (torch.tensor([11, 7, 1, 1, 3]).double() / 11).float())
    model.set_popularity(torch.tensor([0, 4, 1e-300, 0], dtype=torch.float64))
    assert torch.isfinite(model.item_popularity.log()).all()


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "double and half": lambda model: model.double().half(),
    "copied": lambda model: copy.deepcopy(model.half()).half(),
    "within another": lambda model: torch.nn.Sequential(model).half()[0],
    "compiled": lambda model: torch.compile(model).half()._orig_mod,
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_to_16_bits_leaves_the_popularity_as_it_is(cast):
    model = make_model()
    model.set_popularity([0, 1, 3, 10**9])
    want, names = model.item_popularity.clone(), list(model.state_dict())
    model = CASTS[cast](model)
    assert model.fusion.router.weight.itemsize == 2
    assert model.item_popularity.dtype == torch.float32 and torch.equal(model.item_popularity, want)
    assert list(model.state_dict()) == names
    assert torch.equal(model.float().item_popularity, want)
    assert model.double().item_popularity.dtype == torch.float64
    assert model.half().to("meta").item_popularity.is_meta


def test_a_model_in_bf16_that_grows_or_shrinks_keeps_its_popularity():
    model = make_model()
    model.set_popularity([0, 7, 3, 10**6])
    want = model.item_popularity.clone()
    grown = model.bfloat16().extend(Modality("sound", 8, LEVELS))
    assert grown.fusion.router.weight.dtype == torch.bfloat16
    assert torch.equal(grown.item_popularity, want)
    assert torch.equal(grown.remove("text").item_popularity, want)


def test_weights_that_were_saved_without_a_catalogue_load():
    model, other = make_model(), make_model()
    model.set_popularity(split_of(make_cache()))
    old = {name: value for name, value in model.state_dict().items() if name != "catalogue_digest"}
    other.set_popularity([0, 1], Catalogue.of(["a"]))
    other.load_state_dict(old)
    assert other.catalogue is None
    assert torch.isfinite(other(IDS, cache=make_cache()).loss)
    assert "catalogue_digest" not in old, "the caller's own is as it was"


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_a_compiled_step_compares_while_it_is_traced(loss):
    model, cache, grown = make_model(loss), make_cache(), make_cache(GROWN)
    model.set_popularity(split_of(cache))
    expected = model(IDS, cache=cache).loss
    grown.warm(wait=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, cache=grown).loss, expected)
    other = make_cache(names=NAMES[::-1])
    other.warm(wait=True)
    with pytest.raises(Exception, match="require"):
        compiled(IDS, cache=other)
