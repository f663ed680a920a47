"""Items drawn as negatives, for `loss="sampled"` ◊: N a step, with replacement, the same for all its rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from crossan_fast import _sources, ops
from crossan_fast._sources import ReadAhead

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.model import CrossanModel


class Drawn(NamedTuple):
    """Attributes:
    unique: the distinct items of the batch and of the draws, U, each as often as it stands in both; `slots`
        those of the batch.
    counts: int64 `[U]`, how often each was drawn; 0 takes it out of every sum.
    log_chance: `[U]`, log of each one's share of the draws, up to a constant, which no softmax sees.
    """

    unique: ops.Deduplicated
    counts: Tensor
    log_chance: Tensor


class Sampler:
    """Draws what a model's config says, uniformly or by popularity, of items that have some modality."""

    def __init__(self) -> None:
        self._bounds = torch.empty(0, dtype=torch.float64)  # item i is from bound i - 1 to bound i
        # What they were made of; while the popularity is kept, no other has its id.
        self._of: Callable[[], HiddenStateCache | None] = lambda: None
        self._popularity: Tensor | None = None
        self._key: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[Sampler], tuple[()]]:
        return Sampler, ()  # a copy of a model makes bounds of its own

    def draw(
        self, model: CrossanModel, item_ids: Tensor, cache: HiddenStateCache, known: int, ahead: ReadAhead
    ) -> Drawn:
        """Negatives for a batch `[B, S + 1]`, of items 1 to `known`; a GPU is waited for once.

        Args:
            ahead: its `capacity` counts; rows that were read ahead lack those of the draws.
        """
        drawn = self.ids(model, cache, known, item_ids.device)
        capacity = ReadAhead(capacity=ahead.capacity).slots(item_ids)
        if capacity is not None:
            capacity += len(drawn)
        flat = torch.cat([item_ids.reshape(-1), drawn])
        joined = ops.deduplicate(flat, capacity, backend=model.backend_for("deduplicate"))
        of_batch, of_draws = joined.slots.split([item_ids.numel(), len(drawn)])
        counts = torch.zeros_like(joined.counts)
        counts.scatter_add_(0, of_draws, torch.ones_like(of_draws))
        if model.config.negative_sampling == "popularity":
            log_chance = model._log_popularity(joined.ids)
        else:
            log_chance = torch.zeros(len(joined.ids), device=item_ids.device)
        return Drawn(joined._replace(slots=of_batch.reshape(item_ids.shape)), counts, log_chance)

    def ids(self, model: CrossanModel, cache: HiddenStateCache, known: int, device: torch.device) -> Tensor:
        """int64 `[N]`."""
        popularity = model.item_popularity
        if self._of() is not cache or self._key != (id(popularity), popularity._version, known, device):
            # The sums are the host's, in order: a device's would differ from run to run.
            self._bounds = _weights(model, cache, known).cumsum(0).to(device)
            self._of, self._popularity = weakref.ref(cache), popularity
            self._key = (id(popularity), popularity._version, known, device)
        total = self._bounds[-1]
        where = torch.rand(model.config.negatives, device=device, dtype=torch.float64) * total
        # A product may round up to the total itself, which is beyond the last item.
        where = torch.minimum(where, total * (1 - 2**-52))
        return torch.searchsorted(self._bounds, where, right=True)


def _weights(model: CrossanModel, cache: HiddenStateCache, known: int) -> Tensor:
    """float64 `[known + 1]` on the host: what draws are in proportion to; 0 at padding and at bare items."""
    weights = torch.ones(known + 1, dtype=torch.float64)
    if model.config.negative_sampling == "popularity":
        if not model.item_popularity.numel():
            raise ValueError(
                "item_popularity: negative_sampling='popularity' needs set_popularity(counts) first"
            )
        weights = model.item_popularity[: known + 1].to("cpu", torch.float64, copy=True)
    weights[0] = 0
    bare = _sources.bare_in(model.config, cache, torch.device("cpu"))
    return weights if bare is None else weights.masked_fill(bare[: known + 1], 0)
