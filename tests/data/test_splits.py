"""Leave-one-out splits, judged against Python slices of every user's list."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossan_fast.data import (
    Interactions,
    Split,
    build_interactions,
    leave_one_out,
    read_interactions,
    read_items,
)


def padded(sequence: list[int], width: int) -> list[int]:
    tail = sequence[-width:] if width else []
    return [0] * (width - len(tail)) + tail


def check(interactions: Interactions, window: int, users: range) -> Split:
    split = leave_one_out(interactions, window)
    sequences = [interactions.sequence(u).tolist() for u in range(interactions.num_users)]
    longest = max(map(len, sequences))
    for u in users:
        sequence = sequences[u]
        assert split.train[u].tolist() == padded(sequence[:-2], window + 1)
        assert split.validation_input[u].tolist() == padded(sequence[:-2], window)
        assert split.validation_target[u] == sequence[-2]
        assert split.test_input[u].tolist() == padded(sequence[:-1], window)
        assert split.test_target[u] == sequence[-1]
        assert split.history_validation[u].tolist() == padded(sequence[:-2], longest - 2)
        assert split.history_test[u].tolist() == padded(sequence[:-1], longest - 1)
    counts = [0] * (interactions.num_items + 1)
    for sequence in sequences:
        for row in sequence[:-2]:
            counts[row] += 1
    assert split.train_counts.tolist() == counts
    assert (split.num_users, split.num_items, split.window) == (
        len(sequences),
        interactions.num_items,
        window,
    )
    assert {t.dtype for t in vars(split).values() if isinstance(t, torch.Tensor)} == {torch.int64}
    return split


@pytest.mark.parametrize("window", [1, 2, 5, 10, 40])
def test_equals_slices_of_each_list(window: int) -> None:
    rng = np.random.default_rng(window)
    sequences = {
        f"u{u}": [f"i{i}" for i in rng.integers(0, 25, size=length)]
        for u, length in enumerate([3, 4, 17, *rng.integers(3, 18, size=60)])
    }
    interactions = build_interactions(sequences, min_items=3, max_items=17)
    check(interactions, window, range(interactions.num_users))


def test_docstring_example() -> None:
    split = leave_one_out(build_interactions({"u": list("abcdef"), "v": list("fedcb")}), 3)
    assert split.train.tolist() == [[1, 2, 3, 4], [0, 6, 5, 4]]
    assert split.validation_input.tolist()[0] == [2, 3, 4]
    assert split.test_input.tolist()[0] == [3, 4, 5]
    assert (split.validation_target[0], split.test_target[0]) == (5, 6)
    assert split.history_validation.tolist()[0] == [1, 2, 3, 4]
    assert split.history_test.tolist() == [[1, 2, 3, 4, 5], [0, 6, 5, 4, 3]]
    assert split.train_counts.tolist() == [0, 1, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("window", [2, 10, 20])
def test_the_window_decides_what_is_kept(window: int) -> None:
    """As if the reader had kept the window, the item that it predicts and both targets."""
    sequences = {"long": [f"i{k}" for k in range(40)], "short": list("abcde")}
    split = leave_one_out(build_interactions(sequences), window)
    kept = build_interactions(sequences, [*sequences["long"], *"abcde"], max_items=window + 3)
    expected = leave_one_out(kept, window)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(split, name), value), name
    assert split.train[0].tolist() == list(range(38 - window, 39)), "no place of the window is empty"
    assert int(split.train_counts.sum()) == window + 1 + 3


def test_a_readers_limit_stands() -> None:
    sequences = {"u": [f"i{k}" for k in range(40)]}
    split = leave_one_out(build_interactions(sequences, max_items=30), 5)
    assert split.history_test.shape == (1, 29)
    assert int(split.train_counts.sum()) == 28


def test_to_moves_every_tensor() -> None:
    split = leave_one_out(build_interactions({"u": list("abcde")}), 2).to("meta")
    assert {t.device.type for t in vars(split).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert split.window == 2


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"leave-one-out needs 3 items a user, 'v' has 2"):
        leave_one_out(build_interactions({"u": list("abc"), "v": list("ab")}, min_items=2), 3)
    with pytest.raises(ValueError, match=r"window: expected an integer of at least 1, got 0"):
        leave_one_out(build_interactions({"u": list("abcde")}), 0)
    for wrong in ("5", 2.5):
        with pytest.raises(TypeError, match=rf"window: expected an integer .*{wrong}"):
            leave_one_out(build_interactions({"u": list("abcde")}), wrong)  # type: ignore[arg-type]
    nobody = Interactions([], ["", "a"], np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match=r"expected at least one user, got none"):
        leave_one_out(nobody, 3)


def test_scientific_targets_repeat_history_as_published(scientific: Path) -> None:
    items = read_items(scientific / "items.tsv")
    interactions = read_interactions(scientific / "users.tsv", items.names, max_items=13)
    split = check(interactions, 10, range(0, 12076, 97))
    assert split.train.shape == (12076, 11)
    repeats = (split.history_test == split.test_target[:, None]).any(1)
    assert round(100 * repeats.double().mean().item(), 2) == 5.14
