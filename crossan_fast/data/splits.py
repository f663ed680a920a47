"""Leave-one-out splits of sequences, as padded tensors that a device can hold whole.

For a user who took a b c d e f (oldest first) and a window S = 3:

    train               a b c d          (0 a b c for a user with three items before the targets)
    validation_input    b c d            validation_target   e
    test_input          c d e            test_target         f
    history_validation  a b c d          history_test        a b c d e    (left-padded to the longest)

Every tensor is int64 with 0 as padding, on the left. Of a longer sequence the last S + 3 items count, all
that a window of training with its target and both held-out targets need; or the last `max_items` of the
reader of the interactions, where it was told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast.data.catalogue import Catalogue
from crossan_fast.data.interactions import Interactions


@dataclass(frozen=True)
class Split:
    """A leave-one-out split of U users over I items with window S; H is the longest history."""

    window: int
    train: Tensor
    """[U, S + 1]: the last S + 1 items before both targets."""
    validation_input: Tensor
    """[U, S]: the last S items before the validation target."""
    validation_target: Tensor
    """[U]"""
    test_input: Tensor
    """[U, S]: the last S items before the test target, the validation target among them."""
    test_target: Tensor
    """[U]"""
    history_validation: Tensor
    """[U, H - 1]: all items before the validation target, for filtering."""
    history_test: Tensor
    """[U, H]: all items before the test target."""
    train_counts: Tensor
    """[I + 1]: how often each row occurs before the targets; row 0 (padding) is 0."""
    catalogue: Catalogue
    """What the rows mean: compared with a cache's wherever the two meet."""

    @property
    def num_users(self) -> int:
        return self.train.shape[0]

    @property
    def num_items(self) -> int:
        return self.catalogue.num_items

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def leave_one_out(interactions: Interactions, window: int) -> Split:
    """Hold out each user's last item for testing and the one before for validation.

    Of each user the last `interactions.max_items` items count, where that is None the last `window` + 3;
    `train_counts` and the histories cover all of them before the targets, also what lies before the training
    window. Raises ValueError for a window below 1, no users, or a user with fewer than 3 items (named).
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    lengths = interactions.lengths
    if not lengths.size:
        raise ValueError("interactions: expected at least one user, got none")
    if lengths.min() < 3:
        user = int(lengths.argmin())
        raise ValueError(
            f"interactions: leave-one-out needs 3 items a user, "
            f"{interactions.user_names[user]!r} has {lengths[user]}"
        )
    ids, ends = interactions.ids, interactions.offsets[1:]
    counted = np.minimum(lengths, interactions.max_items or window + 3)
    starts, longest = ends - counted, int(counted.max())

    def last(width: int, before_end: int) -> Tensor:
        """[U, width]: the items up to `before_end` places before each user's end, left-padded."""
        return torch.from_numpy(_last(ids, starts, ends - before_end, width))

    before_targets = np.arange(ids.size) < np.repeat(ends - 2, lengths)
    in_train = before_targets & (np.arange(ids.size) >= np.repeat(starts, lengths))
    return Split(
        window=window,
        train=last(window + 1, 2),
        validation_input=last(window, 2),
        validation_target=torch.from_numpy(ids[ends - 2]),
        test_input=last(window, 1),
        test_target=torch.from_numpy(ids[ends - 1]),
        history_validation=last(longest - 2, 2),
        history_test=last(longest - 1, 1),
        train_counts=torch.from_numpy(np.bincount(ids[in_train], minlength=len(interactions.item_names))),
        catalogue=interactions.catalogue,
    )


def _last(
    ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """[U, width]: the last `width` of each `ids[start:end]`, left-padded with 0."""
    places = ends[:, None] - width + np.arange(width)  # [U, width]
    return np.where(places >= starts[:, None], ids[np.maximum(places, 0)], 0)
