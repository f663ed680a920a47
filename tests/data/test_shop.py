"""The synthetic shop: what was planted is there, can be read back, and shows in its own modality alone."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from crossan_fast.data import Shop, leave_one_out, make_shop, read_interactions, read_items
from crossan_fast.data.shop import FAVOURITE, FOLLOW, MAX_LENGTH, MIN_LENGTH, MODALITIES, NUM_KINDS


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop(seed=0)


def test_parts_and_their_shapes(shop: Shop) -> None:
    n, users = 1024, 2000
    assert (len(shop.item_names), len(shop.titles), len(shop.sequences)) == (n, n, users)
    assert (shop.images.shape, shop.images.dtype) == ((n, 32, 32, 3), np.uint8)
    assert (shop.clips.shape, shop.clips.dtype) == ((n, 4, 32, 32, 3), np.uint8)
    assert (shop.sounds.shape, shop.sounds.dtype) == ((n, 32, 32), np.float32)
    assert all(len(title.split()) == 4 for title in shop.titles)
    assert len(set(shop.titles)) == n  # equal titles would tie, and ties count against the target
    lengths = {len(names) for names in shop.sequences.values()}
    assert (min(lengths), max(lengths)) == (MIN_LENGTH, MAX_LENGTH)
    _, per_combination = np.unique(shop.traits, axis=0, return_counts=True)
    assert per_combination.tolist() == [n // NUM_KINDS**4] * NUM_KINDS**4


def test_seed_decides_everything_and_parts_do_not_disturb_each_other() -> None:
    a, b = make_shop(seed=5, num_items=256, num_users=20), make_shop(seed=5, num_items=256, num_users=20)
    for name in ("traits", "images", "clips", "sounds", "appeal", "next_kind"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (a.titles, a.sequences) == (b.titles, b.sequences)
    more_users = make_shop(seed=5, num_items=256, num_users=30)
    assert np.array_equal(a.clips, more_users.clips)
    assert a.titles == more_users.titles
    other = make_shop(seed=6, num_items=256, num_users=20)
    assert not np.array_equal(a.images, other.images)
    assert a.sequences != other.sequences


def test_sequences_follow_the_planted_chances(shop: Shop) -> None:
    """Each trait follows with FOLLOW plus what favourites and chance add; the shares add up over kinds."""
    rows = shop.interactions()
    traits = shop.traits[rows.ids - 1]  # [interactions, 4]
    inside = np.ones(len(traits) - 1, dtype=bool)
    inside[rows.offsets[1:-1] - 1] = False  # pairs that span two users
    followed = (shop.next_kind[np.arange(4), traits[:-1]] == traits[1:])[inside]
    expected = FOLLOW + (1 - FOLLOW) / NUM_KINDS  # favourites are uniform over users
    error = 4 * np.sqrt(expected * (1 - expected) / len(followed))
    assert np.abs(followed.mean(0) - expected).max() < 2 * error
    for step in shop.next_kind:
        assert sorted(step) == [0, 1, 2, 3]
        assert sum(step == np.arange(4)) == 2
    independent = np.corrcoef(followed.T) - np.eye(4)
    assert np.abs(independent).max() < 0.05


def oracle_log_chances(shop: Shop, history: npt.NDArray[np.int64], modality: int) -> npt.NDArray[np.float64]:
    """[kinds]: log chance of each kind next, with the posterior of the user's favourite from the history."""
    step = shop.next_kind[modality]
    kinds = shop.traits[history - 1, modality]
    chance = (1 - FOLLOW - FAVOURITE) / NUM_KINDS
    log_posterior = np.zeros(NUM_KINDS)
    for t, kind in enumerate(kinds):
        likelihood = np.full(NUM_KINDS, chance)
        likelihood[kind] += FAVOURITE
        likelihood += FOLLOW * (step[kinds[t - 1]] == kind) if t else FOLLOW / NUM_KINDS
        log_posterior += np.log(likelihood)
    posterior = np.exp(log_posterior - log_posterior.max())
    following = chance + FAVOURITE * posterior / posterior.sum()
    following[step[kinds[-1]]] += FOLLOW
    return np.log(following)


def hit_rate(scores: npt.NDArray[np.float64], histories: torch.Tensor, targets: torch.Tensor) -> float:
    """HR@10 in % over the full catalogue, history filtered but for the target, ties count against."""
    scores = scores.copy()
    users = np.arange(len(scores))
    of_target = scores[users, targets]
    scores[users[:, None], histories] = -np.inf
    scores[:, 0] = -np.inf
    scores[users, targets] = of_target
    return 100 * float(((scores >= of_target[:, None]).sum(1) <= 10).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_modality_narrows_the_catalogue(seed: int) -> None:
    """A recommender that knows the planted process gains from every modality that it may look at."""
    shop = make_shop(seed=seed)
    rows = shop.interactions()
    split = leave_one_out(rows, 10)
    popularity = np.tile(split.train_counts.double().numpy(), (split.num_users, 1))
    rates = [hit_rate(popularity, split.history_test, split.test_target)]
    scores = np.tile(np.log(np.concatenate([[1.0], shop.appeal])), (split.num_users, 1))
    for m in range(len(MODALITIES)):
        chances = np.stack(
            [oracle_log_chances(shop, rows.sequence(u)[:-1], m) for u in range(split.num_users)]
        )
        scores[:, 1:] += chances[:, shop.traits[:, m]]
        rates.append(hit_rate(scores, split.history_test, split.test_target))
    # Training has to reach 3 times popularity and a strict order: the ceiling leaves it room for losses.
    assert 0 < rates[0] < 5
    assert all(after > 1.35 * before for before, after in pairwise(rates))
    assert rates[4] > 25 * rates[0]


def probe_accuracy(states: npt.NDArray[np.float64], kinds: npt.NDArray[np.int64]) -> float:
    """Ridge regression onto one-hot kinds, fitted on the even items and scored on the odd ones."""
    x = (states - states[::2].mean(0)) / states[::2].std(0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    fit = x[::2]
    weights = np.linalg.solve(fit.T @ fit + 0.1 * np.eye(x.shape[1]), fit.T @ np.eye(NUM_KINDS)[kinds[::2]])
    return float(((x[1::2] @ weights).argmax(1) == kinds[1::2]).mean())


@pytest.mark.parametrize("initializer_range", [0.02, 0.1])
def test_random_encoders_show_each_trait_in_its_own_modality_alone(
    shop: Shop, initializer_range: float
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `encoders`")
    torch.manual_seed(7)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": initializer_range,
    }
    pictures = {"image_size": 32, "patch_size": 8}
    words = {word: i for i, word in enumerate(sorted({w for title in shop.titles for w in title.split()}))}

    def pixels(values: npt.NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(values).float().div(127.5).sub(1)

    encoders = {
        "text": (
            transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **size)),
            {"input_ids": torch.tensor([[words[w] for w in title.split()] for title in shop.titles])},
        ),
        "image": (
            transformers.ViTModel(transformers.ViTConfig(**pictures, **size)),
            {"pixel_values": pixels(shop.images).permute(0, 3, 1, 2)},
        ),
        "video": (
            transformers.VideoMAEModel(
                transformers.VideoMAEConfig(num_frames=4, tubelet_size=2, **pictures, **size)
            ),
            {"pixel_values": pixels(shop.clips).permute(0, 1, 4, 2, 3)},
        ),
        "audio": (
            transformers.ASTModel(
                transformers.ASTConfig(
                    patch_size=8, time_stride=8, frequency_stride=8, max_length=32, num_mel_bins=32, **size
                )
            ),
            {"input_values": torch.from_numpy(shop.sounds)},
        ),
    }
    assert tuple(encoders) == MODALITIES
    for m, (name, (encoder, inputs)) in enumerate(encoders.items()):
        with torch.no_grad():
            states = encoder.eval()(**inputs, output_hidden_states=True).hidden_states
        for level in (0, -1):
            pooled = states[level].mean(1).double().numpy()
            accuracy = [probe_accuracy(pooled, shop.traits[:, k]) for k in range(4)]
            own = accuracy.pop(m)
            assert own > 0.99, (name, level, own)
            # 512 items at chance 1/4: a standard deviation is 0.019.
            assert max(accuracy) < 0.25 + 4 * 0.02, (name, level, accuracy)


def test_first_frames_of_clips_tell_nothing(shop: Shop) -> None:
    first = shop.clips[:, 0].reshape(1024, -1).astype(np.float64)
    small = first.reshape(1024, 16, -1).mean(2)
    assert probe_accuracy(small, shop.traits[:, 2]) < 0.25 + 4 * 0.02


def test_written_shop_comes_back_through_the_readers(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs the extra `encoders`")
    shop = make_shop(tmp_path / "new" / "shop", seed=3, num_items=256, num_users=40)
    assert shop.folder == tmp_path / "new" / "shop"
    items = read_items(shop.folder / "items.tsv", strict=True)
    assert items == shop.item_table()
    read = read_interactions(shop.folder / "users.tsv", items.names, strict=True)
    assert np.array_equal(read.ids, shop.interactions().ids)
    assert read.user_names == list(shop.sequences)
    media = {column: items.paths(column) for column in ("image_path", "video_path", "audio_path")}
    for i in (0, 17, 255):
        files = {column: paths[i] for column, paths in media.items()}
        assert np.array_equal(np.asarray(image.open(files["image_path"])), shop.images[i])
        assert np.array_equal(np.load(files["video_path"], allow_pickle=False), shop.clips[i])
        assert np.array_equal(np.load(files["audio_path"], allow_pickle=False), shop.sounds[i])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image", reason="needs the extra `encoders`")
    saved = []

    def full_disk(file: Path, array: object) -> None:
        saved.append(file)
        if len(saved) == 5:
            raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        make_shop(tmp_path / "shop", num_items=256, num_users=10)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"num_items: expected at least 256, .* got 255"):
        make_shop(num_items=255)
    with pytest.raises(ValueError, match=r"num_users: expected at least 1, got 0"):
        make_shop(num_users=0)
    (tmp_path / "precious.txt").touch()
    with pytest.raises(FileExistsError, match=r"folder: expected a new or empty folder, .* holds something"):
        make_shop(tmp_path, num_items=256, num_users=10)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'crossan-fast\[encoders\]'"):
        make_shop(tmp_path / "shop", num_items=256, num_users=10)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
