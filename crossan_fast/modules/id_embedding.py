"""A vector for each item that training sees, beside what its modalities say."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from crossan_fast.config import CrossanConfig


class IdEmbedding(nn.Module):
    """A table `[I + 1, d]` ◊; an item that training never saw is absent from it, whatever its row holds.

    Empty until `allocate`: how many items there are is no part of a config. As an expert it starts near zero,
    so that items start near what their modalities say; where it is added, at zero, and they start there.

    Attributes:
        weight: `[I + 1, d]`; row 0 (padding) is never read.
        seen: buffer bool `[I + 1]`: the items that training has interactions of.
    """

    seen: Tensor

    def __init__(self, config: CrossanConfig) -> None:
        super().__init__()
        # The gradient of a sum does not vanish at zero, that of an expert's first layer would.
        self.std = config.adapter_std if config.id_expert else 0.0
        self.weight = nn.Parameter(torch.empty(0, config.embedding_dim))
        self.register_buffer("seen", torch.empty(0, dtype=torch.bool))

    @torch.no_grad()
    def allocate(self, seen: Tensor) -> None:
        """Know the items of `seen`, bool `[I + 1]`; rows that were there keep their vectors.

        The parameter stays the same object, so that an optimizer that has it goes on with it: what it
        remembers of rows that are new is zero.
        """
        held, width = self.weight.shape
        if len(seen) != held:
            rows = self.weight.new_empty(len(seen), width).normal_(std=self.std)
            kept = min(held, len(seen))
            rows[:kept] = self.weight[:kept]
            self._hold(rows)
        self.seen = seen.to(self.weight.device)
        self.seen[0] = False

    def _hold(self, rows: Tensor) -> None:
        if len(self.weight):
            self.weight._was_resized = True  # type: ignore[attr-defined]
            _watch_optimizers()
        self.weight.data = rows
        self.weight.grad = None

    def forward(
        self, embeddings: Tensor, present: Tensor | None, items: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For `id_fusion="expert"`: embeddings with the items' own behind them, and which are present.

        Args:
            present: bool `[N, M]`; None: all present.
            items: int64 `[N]`, rows of the catalogue, 0 and those beyond the table being absent; None: no
                item is known.

        Returns:
            `[N, T + 1, d]`, and bool `[N, M + 1]`, or `[N, T + 1]` where `present` is None.
        """
        if present is None:
            present = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool)
        own, known = embeddings.new_zeros(embeddings[:, 0].shape), present.new_zeros(len(embeddings))
        if items is not None and len(self.weight):
            own, known = self._own(items, embeddings.dtype)
        return torch.cat([embeddings, own[:, None]], 1), torch.cat([present, known[:, None]], 1)

    def added_to(self, fused: Tensor, items: Tensor | None) -> Tensor:
        """For `id_fusion="sum"`: `fused` `[N, d]` with the items' own added, zeros where absent.

        Args:
            items: as for `forward`.
        """
        if items is None or not len(self.weight):
            return fused
        return fused + self._own(items, fused.dtype)[0]

    def _own(self, items: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`[N, d]`, zeros where absent, and bool `[N]`, which are not."""
        row = torch.where(items < len(self.weight), items, 0)
        known = self.seen[row]
        return torch.where(known[:, None], rows_of(self.weight, row).to(dtype), 0), known

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        empty = self.seen.new_empty(0)
        weight, seen = (state_dict.get(prefix + name, empty) for name in ("weight", "seen"))
        # The catalogue's size is not part of the config: the table takes the one that was saved.
        if weight.dim() == 2 and seen.shape == weight.shape[:1] != self.seen.shape:
            self._hold(self.weight.new_empty(weight.shape[0], self.weight.shape[1]))
            self.seen = self.seen.new_empty(seen.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


@functools.cache
def _watch_optimizers() -> None:
    """From the first table on that changes its size; torch's fused optimizers would read and write beyond."""
    register_optimizer_step_pre_hook(_fit_states)


@torch.no_grad()
def _fit_states(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """As many rows of moments as a resized table has."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not getattr(parameter, "_was_resized", False):
                continue
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 2 and len(value) != len(parameter):
                    fitting = value.new_zeros(parameter.shape)
                    kept = min(len(value), len(parameter))
                    fitting[:kept] = value[:kept]
                    state[name] = fitting


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`.

    A CPU adds up an embedding's gradient by rows, indexing's by elements; on a GPU it is indexing's that
    repeats bit for bit at every size.
    """
    return F.embedding(index, table) if table.device.type == "cpu" else table[index]
