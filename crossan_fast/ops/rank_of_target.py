"""rank_of_target: where a user's target stands in the full ranking (docs/mathematics.md, "Evaluation").

rank = 1 + #{j ≠ t : score_j ≥ score_t}: ties count against the target, so a constant scorer gets nothing.
A score that is NaN counts as −inf, so a target with it has the last rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossan_fast._checks import check_range, check_tensor, describe
from crossan_fast.ops._dispatch import choose
from crossan_fast.ops._registration import define, on_one_device
from crossan_fast.ops._score_tiles import check_ranking, dot_products, score_tiles


def rank_of_target_reference(
    users: Tensor, items: Tensor, targets: Tensor, exclude: Tensor | None = None
) -> Tensor:
    """The definition, in plain torch; memory is B × tile, never B × I.

    Args:
        users: `[B, d]`.
        items: `[I + 1, d]`; row 0 is padding and never ranked.
        targets: int64 `[B]`, 1 … I.
        exclude: int64 `[B, H]`, ids whose score is −inf for the row; 0 stands for none. A target among them
            has score −inf itself, and so the last rank, I.

    Returns:
        int64 `[B]`, 1 … I; I also where the target's score is −inf or, by NaN or inf in the user or in the
        item, no number. An item whose score is no number stands ahead of no other.
    """
    target_score = dot_products(users, items[targets][:, None])
    if exclude is not None:
        excluded = (exclude == targets[:, None]).any(dim=1, keepdim=True)
        target_score = target_score.masked_fill(excluded, float("-inf"))
    ahead = torch.zeros_like(targets)
    for _, scores in score_tiles(users, items, exclude):
        ahead += (scores >= target_score).sum(dim=1)
    return ahead  # the target itself is among the counted: that is the 1


@on_one_device
def rank_of_target(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    exclude: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Full-catalogue ranks; arguments as `rank_of_target_reference`. No gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit, named; on the CPU also targets out of range.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    check_ranking(users, items, exclude)
    check_tensor("targets", targets, (None,), dtypes=(torch.int64,))
    if targets.shape[0] != users.shape[0]:
        raise ValueError(f"targets: expected an id for each row of users, got {describe(targets)}")
    check_range("targets", targets, 1, items.shape[0] - 1)
    users, items = users.detach(), items.detach()
    choice = choose("rank_of_target", users.device.type, users.dtype, (), backend)
    if choice.backend == "eager":
        return rank_of_target_reference(users, items, targets, exclude)
    return _rank_of_target(users, items, targets, exclude, choice.backend)


def _fake(users, items, targets, exclude):
    return users.new_empty(users.shape[:1], dtype=torch.int64)


_rank_of_target = define(
    "rank_of_target(Tensor users, Tensor items, Tensor targets, Tensor? exclude) -> Tensor", _fake
)
