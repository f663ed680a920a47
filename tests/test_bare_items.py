"""Items that have none of a model's modalities: as if the catalogue did not hold them, but for their rows."""

from __future__ import annotations

import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.cache.writer import write_cache
from crossan_fast.data import build_interactions, leave_one_out
from crossan_fast.training import TrainConfig, evaluate, train

ITEMS, BARE, LEVELS = 12, 5, 2
MODALITIES = [Modality("text", 6, LEVELS), Modality("image", 4, LEVELS)]
NAMES = [f"item{i}" for i in range(1, ITEMS + 1)]
KEPT = torch.tensor([row for row in range(ITEMS + 1) if row != BARE])
# Rows without the bare one: what a shop would have that does not know it.
PLACE = torch.tensor([min(row, row - (row > BARE)) for row in range(ITEMS + 1)])
IDS = torch.tensor([[0, 3, 2, 6], [1, 4, 7, 12], [0, 0, 8, 9]])


@pytest.fixture
def caches():
    """The catalogue with a bare item, and the same one without it."""
    torch.manual_seed(0)
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width) for m in MODALITIES}
    present = torch.ones(ITEMS + 1, 2, dtype=torch.bool)
    present[BARE], present[0], present[3, 1] = False, False, False
    for column, state in enumerate(states.values()):
        state[~present[:, column]] = 0
    whole = HiddenStateCache.from_tensors(states, present, NAMES)
    fewer = HiddenStateCache.from_tensors(
        {name: state[KEPT] for name, state in states.items()},
        present[KEPT],
        [name for row, name in enumerate(NAMES, start=1) if row != BARE],
    )
    return whole, fewer


def make_model(items=ITEMS, **overrides):
    torch.manual_seed(1)
    values = {"bottleneck": 3, "embedding_dim": 8, "window": 3, "dropout": 0.0, "attention_heads": 1}
    model = CrossanModel(CrossanConfig(MODALITIES, **{**values, **overrides}))
    model.set_popularity(torch.ones(items + 1).index_fill_(0, torch.tensor([0]), 0))
    return model


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("fusion", ["momef", "concat"])
def test_the_rest_of_the_catalogue_is_embedded_and_it_is_zeros(caches, fusion, backend):
    whole, fewer = caches
    model = make_model(fusion=fusion)
    model.backend = backend
    items = model.encode_catalogue(whole)
    assert not items[BARE].any()
    torch.testing.assert_close(items[KEPT], model.encode_catalogue(fewer))


@pytest.mark.parametrize("deduplicate", [True, False])
def test_the_full_softmax_does_not_count_it(caches, deduplicate):
    whole, fewer = caches
    losses = []
    for cache, ids, items in ((whole, IDS, ITEMS), (fewer, PLACE[IDS], ITEMS - 1)):
        model = make_model(items, loss="full", deduplicate=deduplicate)
        losses.append(model(ids, cache=cache).loss)
    torch.testing.assert_close(*losses)


def test_a_batch_that_holds_it_is_refused_by_name(caches):
    message = r"item_ids: item 'item5' \(row 5\) has no modality at all, expected at least one of \['text', "
    for loss in ("in_batch", "full"):
        with pytest.raises(ValueError, match=message):
            make_model(loss=loss)(torch.tensor([[1, BARE, 2], [3, 4, 6]]), cache=caches[0])


def test_what_only_another_modality_describes_is_bare(caches):
    model = CrossanModel(CrossanConfig(MODALITIES[1:], bottleneck=3, embedding_dim=8, attention_heads=1))
    items = model.encode_catalogue(caches[0])
    assert items.any(dim=1).logical_not().nonzero().flatten().tolist() == [0, 3, BARE]


def sequences():
    rows = [[1 + (start + 2 * step) % ITEMS for step in range(6)] for start in range(8)]
    return {f"u{user}": [NAMES[row - 1] for row in row_list] for user, row_list in enumerate(rows)}


def test_interactions_with_it_are_dropped_and_counted():
    taken = sequences()
    with pytest.warns(
        UserWarning, match=r"4 interactions with 1 items that have no modality at all, such as"
    ):
        found = build_interactions(taken, NAMES, min_items=3, bare=[BARE])
    assert (found.dropped.bare_items, found.dropped.bare_interactions) == (1, 4)
    assert BARE not in found.ids and found.num_items == ITEMS
    without = {user: [name for name in names if name != "item5"] for user, names in taken.items()}
    assert found.ids.tolist() == build_interactions(without, NAMES, min_items=3).ids.tolist()
    with pytest.raises(ValueError, match=r"4 interactions with 1 items that have no modality"):
        build_interactions(taken, NAMES, min_items=3, bare=[BARE], strict=True)


def test_it_is_no_candidate_of_an_evaluation(caches):
    whole, fewer = caches
    results = []
    for cache, items in ((whole, ITEMS), (fewer, ITEMS - 1)):
        names = [name for name in NAMES if name != "item5" or cache is whole]
        taken = {user: [n for n in row if n != "item5"] for user, row in sequences().items()}
        split = leave_one_out(build_interactions(taken, names, min_items=3), window=3)
        results.append(evaluate(make_model(items), cache, split, k=(5,)))
    assert results[0].metrics == results[1].metrics
    assert [result.candidates for result in results] == [ITEMS - 1, ITEMS - 1]
    with pytest.raises(ValueError, match=r"split: item 'item5' \(row 5\) has no modality at all"):
        split = leave_one_out(build_interactions(sequences(), NAMES, min_items=3), window=3)
        evaluate(make_model(), whole, split, k=(5,))


def test_it_is_never_recommended(caches):
    whole, _ = caches
    model = make_model()
    (best,) = model.recommend([["item1"]], whole, k=ITEMS - 1, filter_history=False)
    assert sorted(item.item for item in best) == [row for row in range(1, ITEMS + 1) if row != BARE]
    with pytest.raises(ValueError, match=rf"k: expected 1 to {ITEMS - 1}"):
        model.recommend([["item1"]], whole, k=ITEMS)
    with pytest.raises(ValueError, match=r"histories\[0\]: item 'item5' \(row 5\) has no modality at all"):
        model.recommend([["item5", "item1"]], whole)
    skipped, only = model.recommend([["item5", "item1"], ["item1"]], whole, unknown="skip", k=3)
    assert [item.item for item in skipped] == [item.item for item in only]
    model.recommend([["item1"]], whole, k=3, deny=["item5"])  # as well it may
    assert "item5" not in model.explain(None, whole)["item"]


@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_a_run_trains_without_it(caches, tmp_path, loss):
    whole, _ = caches
    states = {m.name: whole.states("cpu")[column] for column, m in enumerate(whole.modalities)}
    write_cache(tmp_path / "cache", states, present=whole.present, item_names=NAMES)
    lines = ("\t".join((user, " ".join(names))) for user, names in sequences().items())
    (tmp_path / "users.tsv").write_text("\n".join(lines) + "\n")
    config = TrainConfig.from_dict(
        {
            **{name: str(tmp_path / name) for name in ("cache", "run")},
            "users": str(tmp_path / "users.tsv"),
            "model": {"embedding_dim": 8, "bottleneck": 3, "window": 3, "blocks": 1, "loss": loss},
            "batch_size": 4,
            "epochs": 1,
        }
    )
    with pytest.warns(UserWarning, match=r"items that have no modality at all, such as 'item5'; dropped"):
        results = train(config, progress=False)
    assert results["test"]["candidates"] == ITEMS - 1
