"""Users' vectors against a catalogue, a batch of users at a time: ranks of targets, and lists of the best.

Who scores is a function of rows: a model's encoder, or a baseline (`crossan_fast.training.baselines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crossan_fast import ops
from crossan_fast.model import CrossanModel
from crossan_fast.training.processes import Processes

# Rows of users to their vectors `[B, d]`, whose inner product with an item's is its score.
Users = Callable[[slice], Tensor]


def users_of(model: CrossanModel, items: Tensor, inputs: Tensor) -> Users:
    """Users encoded from histories `inputs` int64 `[U, S]`, left-padded with 0, over embedded `items`."""

    def encode(rows: slice) -> Tensor:
        history = inputs[rows]
        users = model.encode_users(items[history], history != 0)[:, -1].contiguous()
        if not bool(torch.isfinite(users).all()):
            user = rows.start + int((~torch.isfinite(users).all(dim=1)).nonzero()[0])
            raise ValueError(f"model: the embedding of user {user} is not finite")
        return users

    return encode


class Ranking:
    """Candidates, and what a user must not get.

    Args:
        items: `[I + 1, d]`.
        exclude: int64 `[U, H]`, ids that are no candidates for a user, 0 for none; or None.
        candidates: int64 `[C]`, distinct ids to rank among; None: all.
        batch_size: users at once.
        processes: of a run with several: each ranks its share of the users; every process calls.
    """

    def __init__(
        self,
        items: Tensor,
        exclude: Tensor | None,
        *,
        candidates: Tensor | None = None,
        batch_size: int = 1024,
        processes: Processes | None = None,
        backend: Callable[[str], str] = lambda op: "auto",
    ) -> None:
        self._exclude, self._batch_size = exclude, batch_size
        self._processes, self._backend = processes or Processes(), backend
        self._rows = self._place = None
        self._ranked = items
        if candidates is not None:
            self._rows = torch.cat([candidates.new_zeros(1), candidates])
            self._place = torch.zeros(items.shape[0], dtype=torch.int64, device=items.device)
            self._place[candidates] = torch.arange(1, candidates.numel() + 1, device=items.device)
            self._ranked = items[self._rows]

    @torch.no_grad()
    def ranks(self, users: Users, targets: Tensor) -> Tensor:
        """The rank of each user's target, int64 `[U]`, from 1; ties count against it."""
        place = self._place
        if place is not None and bool((place[targets] == 0).any()):
            wrong = int(targets[place[targets] == 0][0])
            raise ValueError(f"candidates: expected every target among them, item {wrong} is not")
        ranks, backend = torch.zeros_like(targets), self._backend("rank_of_target")
        for rows, vectors, banned in self._batches(users, targets.numel()):
            wanted = targets[rows] if place is None else place[targets[rows]]
            ranked = self._ranked.to(vectors.dtype)
            ranks[rows] = ops.rank_of_target(vectors, ranked, wanted, banned, backend=backend)
        return self._processes.sum(ranks)

    @torch.no_grad()
    def best(self, users: Users, count: int, k: int) -> Tensor:
        """The `k` best ids of each of `count` users, int64 `[count, k]`; 0 where there are fewer."""
        lists = torch.zeros(count, k, dtype=torch.int64, device=self._ranked.device)
        backend = self._backend("topk_scores")
        for rows, vectors, banned in self._batches(users, count):
            top = ops.topk_scores(vectors, self._ranked.to(vectors.dtype), k, banned, backend=backend)
            lists[rows] = top.ids if self._rows is None else self._rows[top.ids]
        return self._processes.sum(lists)

    def _batches(self, users: Users, count: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        rank, size = self._processes.rank, self._processes.size
        for start in range(0, count, self._batch_size)[rank::size]:
            rows = slice(start, min(start + self._batch_size, count))
            banned = None if self._exclude is None else self._exclude[rows]
            if banned is not None and self._place is not None:
                banned = self._place[banned]
            yield rows, users(rows), banned


def rank_targets(
    model: CrossanModel,
    items: Tensor,
    inputs: Tensor,
    targets: Tensor,
    exclude: Tensor | None,
    *,
    candidates: Tensor | None = None,
    batch_size: int = 1024,
    processes: Processes | None = None,
) -> Tensor:
    """The rank of each user's target.

    Args:
        model: in evaluation mode; encodes users alone.
        items: `[I + 1, d]`, embeddings of the catalogue.
        inputs: int64 `[U, S]`, left-padded with 0.
        targets: int64 `[U]`.
        exclude, candidates, batch_size, processes: see `Ranking`.

    Returns:
        int64 `[U]`.
    """
    ranking = Ranking(
        items,
        exclude,
        candidates=candidates,
        batch_size=batch_size,
        processes=processes,
        backend=model.backend_for,
    )
    return ranking.ranks(users_of(model, items, inputs), targets)
