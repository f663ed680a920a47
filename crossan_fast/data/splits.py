"""Splits of sequences into training, validation and test, as padded tensors that a device can hold whole.

For a user who took a b c d e f (oldest first), leave-one-out and a window S = 3:

    train               a b c d          (0 a b c for a user with three items before the targets)
    validation_input    b c d            validation_target   e
    test_input          c d e            test_target         f
    history_validation  a b c d          history_test        a b c d e    (left-padded to the longest)

Every tensor is int64 with 0 as padding, on the left. Of a longer sequence the last S + 3 items count, all
that a window of training with its target and both held-out targets need; or the last `max_items` of the
reader of the interactions, where it was told.

The other splits (`by_time`, `by_ratio`, `as_given`) cut each user's sequence into a training, a validation
and a test stretch of any length. Each held-out interaction is a target of its own, ranked from all that its
user took before it; one with nothing before it is left out and counted. `hold_out_users` trains on some users
and evaluates on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast._checks import check_integer
from crossan_fast.data._values import as_number, cut_in, parse_moment
from crossan_fast.data.catalogue import Catalogue
from crossan_fast.data.interactions import Interactions

Ints = npt.NDArray[np.int64]
Stride = int | str | None  # a number, or "prefixes"


@dataclass(frozen=True)
class Split:
    """A split of U users over I items with window S.

    R rows of training, V validation and T test targets; with `leave_one_out` and no stride, all are U. H is
    the longest history.
    """

    window: int
    train: Tensor
    """[R, S + 1]: windows of items before the targets; one a user, the last, or several (`stride`)."""
    validation_input: Tensor
    """[V, S]: the last S items before the validation target."""
    validation_target: Tensor
    """[V]"""
    test_input: Tensor
    """[T, S]: the last S items before the test target, the validation target among them."""
    test_target: Tensor
    """[T]"""
    history_validation: Tensor
    """[V, H]: all items before the validation target, for filtering."""
    history_test: Tensor
    """[T, H]: all items before the test target."""
    train_counts: Tensor
    """[I + 1]: how often each row occurs before the targets; row 0 (padding) is 0."""
    catalogue: Catalogue
    """What the rows mean: compared with a cache's wherever the two meet."""
    num_users: int = 0
    """U, those of training and of evaluation."""
    kind: str = "leave-one-out"
    """How it was made, in words."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What takes no part, and why: counts by reason."""

    @property
    def num_items(self) -> int:
        return self.catalogue.num_items

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def __str__(self) -> str:
        left = [f"{count:,} {reason}" for reason, count in self.left_out.items() if count]
        rows, validation, test = map(len, (self.train, self.validation_target, self.test_target))
        return (
            f"{self.kind}: {rows:,} training rows, {validation:,} validation and {test:,} test targets; "
            f"left out: {', '.join(left) or 'nothing'}"
        )


def leave_one_out(interactions: Interactions, window: int, *, stride: Stride = None) -> Split:
    """Hold out each user's last item for testing and the one before for validation.

    Of each user the last `interactions.max_items` items count, where that is None the last `window` + 3, or
    all with a `stride`; `train_counts` and the histories cover all of them before the targets, also what lies
    before the training window.

    Args:
        stride: 1 to `window`: train on a window every so many items back from the targets, not on the last
            one alone; with `window` every item of a history is a target once. A history of any length then
            counts whole.

    Raises:
        ValueError: a wrong window or stride, no users, or a user with fewer than 3 items (named).
    """
    check_integer("window", window, 1)
    lengths = interactions.lengths
    if lengths.size and lengths.min() < 3:
        user = int(lengths.argmin())
        raise ValueError(
            f"interactions: leave-one-out needs 3 items a user, "
            f"{interactions.user_names[user]!r} has {lengths[user]}"
        )
    ends = interactions.offsets[1:]
    longest = interactions.max_items or (window + 3 if stride is None else None)
    starts = ends - (lengths if longest is None else np.minimum(lengths, longest))
    cuts = _Cuts(starts, ends - 2, ends - 2, ends - 1, ends)
    left_out = {
        "interactions before what a user's window needs": int((starts - interactions.offsets[:-1]).sum())
    }
    return _split(interactions, cuts, window, stride, "leave-one-out", left_out)


def by_time(
    interactions: Interactions,
    window: int,
    validation: str | float,
    test: str | float,
    *,
    stride: Stride = None,
) -> Split:
    """Train on what happened before one moment, validate up to another, test from there on.

    Args:
        validation, test: the moments: ISO 8601 (UTC where there is no zone), or numbers as the source's own
            times are. An interaction at a moment itself is behind it.
        stride: see `leave_one_out`.

    Raises:
        ValueError: interactions without times, moments out of order or unreadable, or a part without any
            interaction.
    """
    if interactions.times is None or interactions.time_unit is None:
        raise ValueError("interactions: a split by time needs times, the source has none")
    cuts: list[float] = []
    for name, moment in (("validation", validation), ("test", test)):
        found = parse_moment(moment) if isinstance(moment, str) else moment
        if found is None:
            raise ValueError(f"{name}: expected an ISO 8601 time or a number, got {moment!r}")
        cuts.append(cut_in(interactions.time_unit, int(found)) if isinstance(moment, str) else found)
    if cuts[0] >= cuts[1]:
        raise ValueError(f"validation, test: expected a moment before another, got {validation} and {test}")
    labels = (interactions.times >= cuts[0]).astype(np.int8) + (interactions.times >= cuts[1])
    return _by_labels(interactions, labels, window, stride, f"by time, at {validation} and {test}")


def by_ratio(
    interactions: Interactions, window: int, validation: float, test: float, *, stride: Stride = None
) -> Split:
    """Hold out the last share of each user's items for testing and the share before for validation.

    Args:
        validation, test: shares, rounded down to whole items for each user, as RecBole's `RS` has them: one
            where the share is less than one item, test before validation, as long as that leaves an item to
            train on; what is left trains.
        stride: see `leave_one_out`.

    Raises:
        ValueError: shares that are not between 0 and 1 together, or a part without any interaction.
    """
    numbers = isinstance(validation, Real) and isinstance(test, Real)
    if not (numbers and 0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"validation, test: expected two shares above 0, together below 1, got {validation!r} and "
            f"{test!r}"
        )
    lengths, ends = interactions.lengths, interactions.offsets[1:]
    # A hair is added, since 0.1 of 10 is one item also where the product rounds below it.
    in_test, in_validation = (
        np.floor(lengths * share + 1e-9).astype(np.int64) for share in (test, validation)
    )
    trained = lengths - in_test - in_validation
    for part in (in_test, in_validation):
        more = (part == 0) & (trained > 1)
        part += more
        trained -= more
    first = ends - in_test - in_validation
    cuts = _Cuts(interactions.offsets[:-1], first, first, ends - in_test, ends)
    return _split(interactions, cuts, window, stride, f"by ratio, {validation} and {test} of each user", {})


def as_given(interactions: Interactions, window: int, *, stride: Stride = None) -> Split:
    """The split that the source came with: its files, or its column of labels.

    A target's history is all of its user's training items, for a test target also the validation items.

    Raises:
        ValueError: a source without a split of its own, or a part without any interaction.
    """
    if interactions.labels is None:
        raise ValueError(
            "interactions: expected a source with a split of its own: a column x_label or split, read with "
            "labels=True, or a file for each part (X.train.inter, X.valid.inter, X.test.inter); got none"
        )
    return _by_labels(interactions, interactions.labels, window, stride, "as given")


def hold_out_users(
    trained: Interactions, evaluated: Interactions, window: int, *, stride: Stride = None
) -> Split:
    """Train on everything of some users, and evaluate on others, whose last item tests and the one before
    validates.

    Users who are in both are left out of evaluation and counted, as are those of fewer than 3 items. `7.0` is
    user `7`: pandas writes a column of whole numbers so where a value is missing.

    Raises:
        ValueError: other rows in one than in the other, or nobody left to evaluate.
    """
    if trained.catalogue != evaluated.catalogue:
        raise ValueError(
            "evaluated: expected interactions over the same items as those trained on, got others"
        )
    known = set(map(as_number, trained.user_names))
    is_known = np.array([as_number(name) in known for name in evaluated.user_names], dtype=bool)
    short = evaluated.lengths < 3
    kept = np.flatnonzero(~is_known & ~short)
    left_out = {
        "users of the evaluation file who are trained on": int(is_known.sum()),
        "users of the evaluation file with fewer than 3 items": int((~is_known & short).sum()),
    }
    ids = np.concatenate([trained.ids, evaluated.ids])
    starts = np.concatenate([trained.offsets[:-1], evaluated.offsets[:-1][kept] + trained.ids.size])
    ends = np.concatenate([trained.offsets[1:], evaluated.offsets[1:][kept] + trained.ids.size])
    both = replace(
        trained, ids=ids, offsets=np.array([0, ids.size]), user_names=["everybody"], times=None, labels=None
    )
    new = np.arange(len(starts)) >= trained.num_users
    cuts = _Cuts(starts, np.where(new, starts, ends), ends - 2 * new, ends - new, ends)
    return _split(both, cuts, window, stride, "users held out, the last two items of each", left_out)


class _Cuts(NamedTuple):
    """Places in `ids`, one of each a user.

    Trained on are `[start, trained)`, validation targets `[validation, test)`, test targets `[test, end)`.
    """

    start: Ints
    trained: Ints
    validation: Ints
    test: Ints
    end: Ints


def _by_labels(
    interactions: Interactions, labels: npt.NDArray[np.int8], window: int, stride: Stride, kind: str
) -> Split:
    """Labels that rise within each user."""
    starts, ends = interactions.offsets[:-1], interactions.offsets[1:]
    up_to = np.concatenate([[0], np.cumsum(labels == 0)]), np.concatenate([[0], np.cumsum(labels <= 1)])
    trained, validated = (starts + (total[ends] - total[starts]) for total in up_to)
    cuts = _Cuts(starts, trained, trained, validated, ends)
    return _split(interactions, cuts, window, stride, kind, {})


def _split(
    interactions: Interactions,
    cuts: _Cuts,
    window: int,
    stride: Stride,
    kind: str,
    left_out: Mapping[str, int],
) -> Split:
    check_integer("window", window, 1)
    if stride not in (None, "prefixes") and not (type(stride) is int and 1 <= stride <= window):
        raise ValueError(f"stride: expected 1 to the window's {window}, or 'prefixes', got {stride!r}")
    ids = interactions.ids
    if not cuts.start.size:
        raise ValueError("interactions: expected at least one user, got none")
    trains = cuts.trained > cuts.start
    first, last = _windows(cuts.start[trains], cuts.trained[trains], window, stride)
    held_out = {
        "validation": _held_out(ids, cuts.start, cuts.validation, cuts.test, window),
        "test": _held_out(ids, cuts.start, cuts.test, cuts.end, window),
    }
    in_train = np.zeros(ids.size + 1, dtype=np.int64)
    np.add.at(in_train, cuts.start, 1)
    np.add.at(in_train, cuts.trained, -1)
    trained_on = ids[np.cumsum(in_train)[:-1] > 0]
    if not trained_on.size:
        raise ValueError(f"split: {kind}: expected interactions to train on, got none")
    for part, found in held_out.items():
        if not found.targets.numel():
            raise ValueError(f"split: {kind}: expected {part} targets with a history, got none")
    without = {f"{part} targets without a history": found.without for part, found in held_out.items()}
    alone = {"users with a single item to train on": int((cuts.trained - cuts.start == 1).sum())}
    return Split(
        window=window,
        train=torch.from_numpy(last_items(ids, first, last, window + 1)),
        validation_input=held_out["validation"].inputs,
        validation_target=held_out["validation"].targets,
        test_input=held_out["test"].inputs,
        test_target=held_out["test"].targets,
        history_validation=held_out["validation"].history,
        history_test=held_out["test"].history,
        train_counts=torch.from_numpy(np.bincount(trained_on, minlength=len(interactions.item_names))),
        catalogue=interactions.catalogue,
        num_users=len(cuts.start),
        kind=kind,
        left_out={**left_out, **without, **alone},
    )


class _HeldOut(NamedTuple):
    inputs: Tensor
    targets: Tensor
    history: Tensor
    without: int


def _held_out(ids: Ints, starts: Ints, first: Ints, end: Ints, window: int) -> _HeldOut:
    """Each place of `[first, end)` as a target, with what stands before it from `starts` on."""
    counts = end - first
    begun = np.repeat(starts, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.repeat(first, counts) + within
    kept = places > begun
    begun, places = begun[kept], places[kept]
    longest = int((places - begun).max(initial=0))
    return _HeldOut(
        torch.from_numpy(last_items(ids, begun, places, window)),
        torch.from_numpy(ids[places]),
        torch.from_numpy(last_items(ids, begun, places, longest)),
        int((~kept).sum()),
    )


def _windows(starts: Ints, ends: Ints, window: int, stride: Stride) -> tuple[Ints, Ints]:
    """Beginnings and ends of the windows of training: each user's last, and those a stride further back."""
    if stride is None:
        return starts, ends
    if isinstance(stride, int):  # so many that the oldest reaches back to the user's first item
        step, counts = stride, 1 + np.maximum(0, -(-(ends - starts - window - 1) // stride))
    else:  # prefixes: the shortest has two items, but for a user with a single one
        step, counts = 1, np.maximum(1, ends - starts - 1)
    back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts), np.repeat(ends, counts) - step * back


def last_items(ids: Ints, starts: Ints, ends: Ints, width: int) -> Ints:
    """[U, width]: the last `width` of each `ids[start:end]`, left-padded with 0."""
    places = ends[:, None] - width + np.arange(width)  # [U, width]
    return np.where(places >= starts[:, None], ids[np.maximum(places, 0)], 0)
