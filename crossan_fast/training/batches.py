"""Batches drawn on the device: sequences stay there, a step picks its rows by index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from crossan_fast._checks import check_integer, check_tensor

# Of an epoch, when distinct ids are counted.
_BATCHES_AT_ONCE = 1024


class Batches:
    """Seeded epochs over sequences `[U, S + 1]` that live on one device.

    Every batch has the shape `[batch_size, S + 1]` (divided by `size` and rounded up), so that a step can be
    captured once: the last batch of an epoch is filled up with rows of padding, which predict nothing and
    stand in no sum. One row that would be alone there, without negatives, gets the epoch's first row for
    company. The order of an epoch depends on the seed and the epoch's number alone: to resume is to
    ask for the next epoch.

    Args:
        sequences: int64, left-padded with 0; rows with fewer than two items have no target and are left out.
        batch_size: rows a batch; one epoch visits every row once (but for that company).
        seed: of the permutations.
        rank, size: with several processes, whose part of each batch to give: every `size`-th row from `rank`
            on. The parts of all make up the batch that one process would draw; they are filled up to one
            shape, so a part of the last batch may be all padding.

    Raises:
        ValueError, TypeError: no row with a target, or a `batch_size` that is no integer of at least 1.
    """

    def __init__(
        self, sequences: Tensor, batch_size: int, seed: int, *, rank: int = 0, size: int = 1
    ) -> None:
        check_tensor("sequences", sequences, (None, None), dtypes=(torch.int64,))
        check_integer("batch_size", batch_size, 1)
        if sequences.shape[1] < 2:
            raise ValueError(f"sequences: expected at least 2 places, got {list(sequences.shape)}")
        kept = sequences[sequences[:, -2] != 0]
        if not kept.shape[0]:
            raise ValueError(
                f"sequences: expected a row with two items or more (a target), got none in {len(sequences)}"
            )
        self.rows = kept.shape[0]
        # The extra row, all padding, is what fills up the last batch.
        self._sequences = torch.cat([kept, kept.new_zeros(1, kept.shape[1])])
        self.batch_size = batch_size
        self._seed = seed
        self._rank, self._size = rank, size
        self._generator = torch.Generator(device=sequences.device)

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def epoch(self, number: int) -> Iterator[Tensor]:
        """The batches of an epoch, drawn without waiting for the device."""
        for index in self._order(number):
            yield self._sequences[index]

    def distinct(self, number: int) -> list[int]:
        """How many distinct ids each batch of an epoch holds, padding always counted as one.

        Asks the device once, before the epoch, what would else be asked at every step.
        """
        counts = []
        for part in self._order(number).split(_BATCHES_AT_ONCE):
            ids = self._sequences[part].flatten(1)
            ids = torch.nn.functional.pad(ids, (1, 0)).sort(dim=1).values
            counts.append(1 + (ids[:, 1:] != ids[:, :-1]).sum(dim=1))
        return [int(count) for count in torch.cat(counts).tolist()]

    def _order(self, number: int) -> Tensor:
        """Rows of each batch, `[batches, rows a batch]`."""
        device = self._sequences.device
        # Hashed together, since the CPU's generator reads 32 bits of its seed, and epoch e of one seed should
        # not be epoch e - 1 of the next.
        mixed = np.random.SeedSequence([self._seed, number]).generate_state(1)
        self._generator.manual_seed(int(mixed[0]))
        order = torch.randperm(self.rows, generator=self._generator, device=device)
        filling = len(self) * self.batch_size - self.rows
        if filling == self.batch_size - 1 > 0:
            order, filling = torch.cat([order, order[:1]]), filling - 1
        order = torch.nn.functional.pad(order, (0, filling), value=self.rows)
        mine = order.reshape(len(self), self.batch_size)[:, self._rank :: self._size]
        part = -(-self.batch_size // self._size)
        return torch.nn.functional.pad(mine, (0, part - mine.shape[1]), value=self.rows)
