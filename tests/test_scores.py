"""Cosine scores, their temperature and label smoothing, against torch's own definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality

LEVELS, ITEMS = 2, 12
IDS = torch.tensor([[0, 3, 2, 5], [3, 4, 3, 9], [0, 0, 7, 3], [2, 3, 5, 1]])


def make_cache():
    torch.manual_seed(3)
    state = torch.randn(ITEMS + 1, LEVELS, 6)
    state[0] = 0
    return HiddenStateCache.from_tensors({"text": state}, item_names=[f"i{n}" for n in range(1, ITEMS + 1)])


def make_model(**values):
    torch.manual_seed(1)
    config = CrossanConfig(
        [Modality("text", 6, LEVELS)], bottleneck=4, embedding_dim=8, window=3, dropout=0.0, **values
    )
    model = CrossanModel(config)
    model.set_popularity(torch.arange(ITEMS + 1))
    return model.double()


@pytest.mark.parametrize("fusion", ["momef", "concat"])
def test_cosine_makes_unit_vectors_and_the_temperature_divides_users(fusion):
    cache = make_cache()
    plain = make_model(fusion=fusion)
    cosine = make_model(fusion=fusion, scores="cosine", temperature=0.25)
    items, raw = cosine.encode_catalogue(cache), plain.encode_catalogue(cache)
    torch.testing.assert_close(items, F.normalize(raw, dim=1))
    mask = IDS[:, :-1] != 0
    users = cosine.encode_users(items[IDS[:, :-1]], mask)
    torch.testing.assert_close(users, 4 * F.normalize(plain.encode_users(items[IDS[:, :-1]], mask), dim=2))
    best = cosine.recommend([[3, 2]], cache, k=ITEMS - 2)[0]
    user = cosine.encode_users(items[torch.tensor([[3, 2]])], torch.ones(1, 2).bool())[0, -1].detach()
    assert [b.item for b in best] == [
        i for i in (items @ user).argsort(descending=True).tolist() if i not in (0, 2, 3)
    ]
    assert best[0].score == pytest.approx(float(items[best[0].item] @ user)) and abs(best[0].score) <= 4.0001


def columns_of(b):
    """A column for each place of the batch that row b may choose, the target's to be put first."""
    own = set(IDS[b].tolist())
    return [i for i in IDS.flatten().tolist() if i and i not in own]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("scores", ["dot", "cosine"])
@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_smoothed_losses_are_torch_s(loss, scores, backend):
    cache = make_cache()
    model = make_model(loss=loss, scores=scores, temperature=0.5, label_smoothing=0.2)
    model.backend = backend
    out = model(IDS, cache=cache)
    items = model._encode_ids(cache, torch.arange(ITEMS + 1), None)
    users = model.encode_users(items[IDS[:, :-1]], IDS[:, :-1] != 0)
    rows = []
    for b, s in ((IDS[:, :-1] != 0) & (IDS[:, 1:] != 0)).nonzero().tolist():
        target = int(IDS[b, s + 1])
        if loss == "full":
            logits, place = items[1:] @ users[b, s], target - 1
        else:
            columns = torch.tensor([target, *columns_of(b)])
            logits = items[columns] @ users[b, s] - torch.log(model.item_popularity[columns])
            place = 0
        rows.append(F.cross_entropy(logits[None], torch.tensor([place]), label_smoothing=0.2))
    want = torch.stack(rows).mean()
    torch.testing.assert_close(out.loss, want)
    weights = list(model.parameters())
    found, truth = (
        torch.autograd.grad(x, weights, materialize_grads=True, allow_unused=True) for x in (out.loss, want)
    )
    for have, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(have, expected)


def test_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="label_smoothing: works on distinct items"):
        make_model(label_smoothing=0.1, deduplicate=False)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        make_model(temperature=0)
    with pytest.raises(ValueError, match=r"scores: expected one of \['dot', 'cosine'\], got 'angle'"):
        make_model(scores="angle")
