"""States and items of a call: chunks of them, and dense copies where a plain product wants one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossan_fast.kernels.side_network.parameters import Items
from crossan_fast.kernels.side_network.plan import Source


@dataclass
class Data:
    """States and items of a call, or of a chunk of its items."""

    states: list[Tensor]
    scales: list[Tensor] | None
    items: Items

    @classmethod
    def of(
        cls,
        states: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        ids: Tensor | None,
        present: Tensor | None,
    ) -> Data:
        # Rows and levels may have any stride (a view of a larger cache); D must be dense, to be read in
        # vectors.
        dense = [s if s.stride(-1) == 1 or s.shape[-1] == 1 else s.contiguous() for s in states]
        if scales is not None:
            scales = [s if s.stride(-1) == 1 or s.shape[-1] == 1 else s.contiguous() for s in scales]
        if present is not None:
            present = (present if present.stride(-1) == 1 else present.contiguous()).view(torch.uint8)
        count = states[0].shape[0] if ids is None else ids.shape[0]
        ids = None if ids is None else ids.contiguous()
        return cls(dense, None if scales is None else list(scales), Items(count, ids, present))

    @property
    def count(self) -> int:
        return self.items.count

    def chunks(self, size: int) -> Iterator[tuple[Data, int, int]]:
        """The data of at most `size` items at a time, with the items' range."""
        for first in range(0, self.count, size):
            last = min(first + size, self.count)
            ids, present = self.items.ids, self.items.present
            items = Items(
                last - first,
                None if ids is None else ids[first:last],
                None if present is None else present[first:last],
            )
            if ids is not None:
                yield Data(self.states, self.scales, items), first, last
            else:
                scales = None if self.scales is None else [s[first:last] for s in self.scales]
                yield Data([s[first:last] for s in self.states], scales, items), first, last

    def source(self, m: int) -> Source:
        scale = None if self.scales is None else self.scales[m]
        return Source(self.states[m], scale, self.items.ids is not None, m)

    def gather(self, m: int, dtype: torch.dtype) -> Tensor:
        """States of modality m, `[n, L, D_m]`, converted; zero where absent."""
        ids, state = self.items.ids, self.states[m]
        if ids is not None:
            kept = state.view(torch.uint8) if state.element_size() == 1 else state
            state = kept.index_select(0, ids).view(state.dtype)
        if self.scales is None:
            state = state.to(dtype)
        else:
            scale = self.scales[m] if ids is None else self.scales[m].index_select(0, ids)
            state = (state.float() * scale[..., None]).to(dtype)
        if self.items.present is None:
            return state
        return torch.where(self.items.present[:, m, None, None] != 0, state, 0)
