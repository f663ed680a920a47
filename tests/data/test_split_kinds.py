"""Splits by time, by ratio, as given and of users, judged against loops over each user's events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crossan_fast.data import (
    Interactions,
    Split,
    as_given,
    build_interactions,
    by_ratio,
    by_time,
    hold_out_users,
    leave_one_out,
    read_interactions,
)

WINDOW = 4
Part = dict[str, list[tuple[int, int]]]


def log(
    tmp_path: Path, header: str = "user,item,timestamp,split"
) -> tuple[Interactions, list[tuple[str, str, int, int]]]:
    """A log of users of 1 to 30 events, some at one time, with a split that follows time within each user."""
    rng = np.random.default_rng(3)
    events = []
    for user, length in enumerate([1, 2, 3, *rng.integers(1, 30, size=40)]):
        times = np.sort(rng.integers(0, 50, size=length))
        labels = np.sort(rng.integers(0, 3, size=length))
        items = rng.integers(0, 20, size=length)
        events += [
            (f"u{user}", f"i{i}", int(t), int(x)) for i, t, x in zip(items, times, labels, strict=True)
        ]
    path = tmp_path / "log.csv"
    path.write_text(header + "\n" + "".join(",".join(map(str, event)) + "\n" for event in events))
    return read_interactions(path, None, min_items=1, labels=True), events


def check(
    split: Split,
    interactions: Interactions,
    part_of: Callable[[str, int], int],
    stride: int | str | None = None,
) -> None:
    """`part_of(user, place)` says to which part the event at a place of a user's sequence belongs."""
    train, rows = [], {1: [], 2: []}
    counts, without = np.zeros(interactions.num_items + 1, dtype=int), {1: 0, 2: 0}
    for u, user in enumerate(interactions.user_names):
        sequence = interactions.sequence(u).tolist()
        kept = [row for place, row in enumerate(sequence) if part_of(user, place) == 0]
        np.add.at(counts, kept, 1)
        ends = [len(kept)] if kept else []
        while isinstance(stride, int) and ends and ends[-1] > WINDOW + 1:
            ends.append(ends[-1] - stride)
        while stride == "prefixes" and ends and ends[-1] > 2:
            ends.append(ends[-1] - 1)
        train += [kept[max(0, end - WINDOW - 1) : end] for end in ends]
        for place, row in enumerate(sequence):
            part = part_of(user, place)
            if part and place:
                rows[part].append((sequence[:place], row))
            elif part:
                without[part] += 1
    assert [[row for row in line if row] for line in split.train.tolist()] == train
    assert split.train.shape[1] == WINDOW + 1
    assert split.train_counts.tolist() == counts.tolist()
    for part, inputs, targets, history in (
        (1, split.validation_input, split.validation_target, split.history_validation),
        (2, split.test_input, split.test_target, split.history_test),
    ):
        assert targets.tolist() == [target for _, target in rows[part]]
        assert [[row for row in line if row] for line in history.tolist()] == [past for past, _ in rows[part]]
        assert [[row for row in line if row] for line in inputs.tolist()] == [
            p[-WINDOW:] for p, _ in rows[part]
        ]
        assert not inputs[:, :-1][inputs[:, 1:] == 0].any(), "padding is on the left"
    assert split.left_out["validation targets without a history"] == without[1]
    assert split.left_out["test targets without a history"] == without[2]
    assert str(without[2]) in str(split) or not without[2]
    assert split.num_users == interactions.num_users


@pytest.mark.parametrize("stride", [None, 1, 3, WINDOW, "prefixes"])
def test_by_time(tmp_path: Path, stride: int | str | None) -> None:
    found, events = log(tmp_path)
    times: dict[str, list[int]] = {}
    for user, _, time, _ in events:
        times.setdefault(user, []).append(time)
    split = by_time(found, WINDOW, 30, 42, stride=stride)
    check(split, found, lambda user, place: (times[user][place] >= 30) + (times[user][place] >= 42), stride)
    assert "by time, at 30 and 42" in str(split)


def test_moments_are_dates_in_the_units_of_the_file(tmp_path: Path) -> None:
    """The same events in seconds, milliseconds and as dates, cut at the same moments."""
    start = 1_577_836_800
    seconds = [start + 86_400 * day + 1 for day in range(40)]
    dates = [f"2020-01-{day + 1:02}T00:00:01Z" for day in range(31)]
    dates += [f"2020-02-{day + 1:02}T01:00:01+01:00" for day in range(9)]
    splits = []
    for times in (seconds, [1000 * time for time in seconds], dates):
        path = tmp_path / "log.csv"
        path.write_text("user,item,time\n" + "".join(f"u,i{k},{time}\n" for k, time in enumerate(times)))
        found = read_interactions(path, None)
        splits.append(by_time(found, WINDOW, "2020-01-31", "2020-02-05T00:00:01Z"))
    for split in splits:
        assert split.validation_target.tolist() == [31, 32, 33, 34, 35]
        assert split.test_target.tolist() == [36, 37, 38, 39, 40], "a moment itself is behind it"


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.5)])
def test_by_ratio(tmp_path: Path, validation: float, test: float) -> None:
    found, _ = log(tmp_path)
    lengths = dict(zip(found.user_names, found.lengths.tolist(), strict=True))

    def part_of(user: str, place: int) -> int:
        parts = [0, int(lengths[user] * validation + 1e-9), int(lengths[user] * test + 1e-9)]
        parts[0] = lengths[user] - sum(parts)
        for part in (2, 1):
            if parts[0] > 1 and not parts[part]:
                parts[part], parts[0] = 1, parts[0] - 1
        return sum(place >= end for end in (parts[0], parts[0] + parts[1]))

    check(by_ratio(found, WINDOW, validation, test), found, part_of)
    ten = build_interactions({"u": [f"i{k}" for k in range(10)]})
    assert by_ratio(ten, 3, 0.1, 0.3).test_target.tolist() == [8, 9, 10]


def test_a_share_of_less_than_one_item_is_one_as_in_recbole() -> None:
    """What RecBole 1.2's `_calcu_split_ids` gives: 5 items as 3, 1, 1; 2 as 1, 0, 1; 1 as 1, 0, 0."""
    taken = {"five": [f"i{k}" for k in range(5)], "two": ["i5", "i6"], "one": ["i7"]}
    split = by_ratio(build_interactions(taken, min_items=1), 3, 0.1, 0.1)
    assert split.validation_target.tolist() == [4]
    assert split.test_target.tolist() == [5, 7]


def test_as_given(tmp_path: Path) -> None:
    found, events = log(tmp_path)
    labels: dict[str, list[int]] = {}
    for user, _, _, label in events:
        labels.setdefault(user, []).append(label)
    check(as_given(found, WINDOW), found, lambda user, place: labels[user][place])


@pytest.mark.parametrize("stride", [1, 3, WINDOW, "prefixes"])
def test_windows_slide_over_long_histories(stride: int | str) -> None:
    rng = np.random.default_rng(1)
    sequences = {
        f"u{u}": [f"i{i}" for i in rng.integers(0, 9, size=n)] for u, n in enumerate([3, 4, 7, 8, 40])
    }
    found = build_interactions(sequences, min_items=3)
    split = leave_one_out(found, WINDOW, stride=stride)
    check(split, found, lambda user, place: max(0, place - len(sequences[user]) + 3), stride)
    targets = sum(
        max(0, int((row > 0).sum()) - 1) for row in leave_one_out(found, WINDOW, stride=WINDOW).train
    )
    assert targets == sum(len(sequence) - 3 for sequence in sequences.values()), (
        "each once, with stride = window"
    )


def test_users_held_out(tmp_path: Path) -> None:
    trained = {"a": list("pqrs"), "b": list("qp"), "c": list("r")}
    evaluated = {"d": list("pqrst"), "b": list("pqr"), "e": list("ts"), "f": list("tsr")}
    items = list("pqrst")
    split = hold_out_users(
        build_interactions(trained, items, min_items=1), build_interactions(evaluated, items, min_items=1), 3
    )
    assert split.train.tolist() == [[1, 2, 3, 4], [0, 0, 2, 1], [0, 0, 0, 3]]
    assert split.train_counts.tolist() == [0, 2, 2, 2, 1, 0], "of those trained on alone"
    assert split.validation_target.tolist() == [4, 4] and split.test_target.tolist() == [5, 3]
    assert split.test_input.tolist() == [[2, 3, 4], [0, 5, 4]]
    assert split.history_validation.tolist() == [[1, 2, 3], [0, 0, 5]]
    assert "1 users of the evaluation file who are trained on" in str(split)
    assert "1 users of the evaluation file with fewer than 3 items" in str(split)
    others = build_interactions(evaluated, items[::-1], min_items=1)
    with pytest.raises(ValueError, match=r"evaluated: expected interactions over the same items"):
        hold_out_users(build_interactions(trained, items, min_items=1), others, 3)


@pytest.mark.parametrize("trained_as", [int, float])
def test_a_user_of_both_files_is_told_in_a_column_of_floats(
    trained_as: Callable[[int], float], tmp_path: Path
) -> None:
    evaluated_as = {int: float, float: int}[trained_as]

    def read(name: str, users: list[int], written: Callable[[int], float]) -> Interactions:
        rows = [f"{written(user)},i{item},{item}\n" for user in users for item in range(4)]
        (tmp_path / name).write_text("user,item,time\n" + "".join(rows))
        return read_interactions(tmp_path / name, [f"i{item}" for item in range(4)], min_items=1)

    trained = read("trained.csv", [1, 7, 10], trained_as)
    split = hold_out_users(trained, read("evaluated.csv", [7, 8, 10, 100], evaluated_as), 3)
    assert split.left_out["users of the evaluation file who are trained on"] == 2
    assert split.num_users == 5 and len(split.test_target) == 2


def test_bad_splits_are_named(tmp_path: Path) -> None:
    timed, _ = log(tmp_path)
    plain = build_interactions({"u": list("abcdefgh")})
    for call, message in (
        (lambda: by_time(plain, 3, 1, 2), r"a split by time needs times, the source has none"),
        (lambda: by_time(timed, 3, 2, 2), r"expected a moment before another, got 2 and 2"),
        (
            lambda: by_time(timed, 3, "soon", 2),
            r"validation: expected an ISO 8601 time or a number, got 'soon'",
        ),
        (
            lambda: by_time(timed, 3, 30, 99),
            r"split: by time, .*: expected test targets with a history, got none",
        ),
        (lambda: by_time(timed, 3, -2, -1), r"expected interactions to train on, got none"),
        (
            lambda: by_ratio(plain, 3, 0.5, 0.5),
            r"expected two shares above 0, together below 1, got 0.5 and 0.5",
        ),
        (lambda: by_ratio(plain, 3, "a", 0.1), r"expected two shares above 0, .*, got 'a' and 0.1"),
        (lambda: as_given(plain, 3), r"expected a source with a split of its own: a column x_label or split"),
        (lambda: leave_one_out(plain, 3, stride=0), r"stride: expected 1 to the window's 3, .* got 0"),
        (lambda: leave_one_out(plain, 3, stride="prefix"), r"stride: .*, or 'prefixes', got 'prefix'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
