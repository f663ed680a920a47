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
        self._bounds = torch.empty(0, dtype=torch.int64)  # item i is from bound i - 1 to below bound i
        # What they were made of; while the popularity is kept, no other has its id.
        self._of: Callable[[], HiddenStateCache | None] = lambda: None
        self._popularity: Tensor | None = None
        self._key: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[Sampler], tuple[()]]:
        return Sampler, ()  # a copy of a model makes bounds of its own

    def draw(
        self, model: CrossanModel, item_ids: Tensor, cache: HiddenStateCache, known: int, ahead: ReadAhead
    ) -> Drawn:
        """Negatives for a batch `[B, S + 1]`, of items 1 to `known`.

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
        bounds = self._bounds_for(model, cache, known, device)
        total = bounds[-1]
        where = torch.rand(model.config.negatives, device=device, dtype=torch.float64) * total
        # A product may round up to the total itself, which is beyond the last item.
        where = torch.minimum(where.to(torch.int64), total - 1)
        return torch.searchsorted(bounds, where, right=True)

    def _bounds_for(
        self, model: CrossanModel, cache: HiddenStateCache, known: int, device: torch.device
    ) -> Tensor:
        if torch.compiler.is_compiling():
            # No trace can tell whether kept ones still hold: a compiled step makes them, in its graph.
            return _bounds(model, cache, known, device)
        popularity = model.item_popularity
        key = (id(popularity), popularity._version, known, device)
        if self._of() is not cache or self._key != key:
            self._bounds = _bounds(model, cache, known, device)
            self._of, self._popularity, self._key = weakref.ref(cache), popularity, key
        return self._bounds


def _bounds(model: CrossanModel, cache: HiddenStateCache, known: int, device: torch.device) -> Tensor:
    """int64 `[known + 1]`: running sums of what draws are in proportion to; 0 for padding and bare items.

    Whole numbers: their sums are exact, so that every device has the same ones in every run.
    """
    weights = torch.ones(known + 1, dtype=torch.float64, device=device)
    if model.config.negative_sampling == "popularity":
        if not model.item_popularity.numel():
            raise ValueError(
                "item_popularity: negative_sampling='popularity' needs set_popularity(counts) first"
            )
        weights = model.item_popularity[: known + 1].to(device, torch.float64)
    bare = _sources.bare_in(model.config, cache, device)
    left_out = torch.arange(known + 1, device=device) == 0
    weights = weights.masked_fill(left_out if bare is None else left_out | bare[: known + 1], 0)
    # As large as leaves the sum of all below 2^63; up, so that the rarest of items is drawn, too.
    return (weights / weights.max() * (2**62 // (known + 1))).ceil().to(torch.int64).cumsum(0)
