"""Encoders in the loop, frozen or trained, over items that were tokenised or preprocessed ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossan_fast.cache.levels import Pooling, pool

# Items that a frozen encoder reads at once.
CHUNK = 256


@dataclass(frozen=True)
class Inputs:
    """What an encoder reads for each row of the catalogue, on the host.

    Attributes:
        values: tokens int `[I + 1, T]`, or pixels `[R, 3, H, W]`; where R is less than I + 1, rows repeat.
        lengths: of texts, real tokens of each row `[I + 1]`; None for pixels.
    """

    values: Tensor
    lengths: Tensor | None = None

    def of(self, ids: Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
        """A model's arguments for the rows `ids`, and bool `[N, T]`, True at real tokens, or None."""
        rows = ids.cpu() % len(self.values)
        if self.lengths is None:
            return {"pixel_values": self.values[rows].to(device, torch.float32)}, None
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).to(device)
        tokens = self.values[rows, :longest].to(device, torch.int64)
        return {"input_ids": tokens, "attention_mask": mask.long()}, mask


class Backbone(nn.Module):
    """A `transformers` encoder with its inputs.

    Args:
        model: of `AutoModel`, without a pooler.
        poolings: how each modality that this encoder serves pools tokens.
        levels: which of its K + 1 states a frozen one gives.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, poolings: Mapping[str, Pooling], levels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.poolings, self.levels = inputs, dict(poolings), levels

    def freeze(self) -> Backbone:
        self.requires_grad_(False)
        return self.eval()

    @torch.no_grad()
    def states(self, ids: Tensor) -> dict[str, Tensor]:
        """Each modality's states `[N, L, D]` of the items `ids`, without gradient."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.poolings}
        for some in ids.split(CHUNK):
            arguments, mask = self.inputs.of(some, ids.device)
            hidden = self.model(**arguments, output_hidden_states=True).hidden_states
            for name, how in self.poolings.items():
                parts[name].append(torch.stack([pool(hidden[level], mask, how) for level in self.levels], 1))
        return {name: torch.cat(found) for name, found in parts.items()}

    def last(self, ids: Tensor) -> dict[str, Tensor]:
        """Each modality's last state `[N, D]` of the items `ids`, with its gradient."""
        if not torch.is_grad_enabled() and len(ids) > CHUNK:
            found = [self.last(some) for some in ids.split(CHUNK)]
            return {name: torch.cat([part[name] for part in found]) for name in self.poolings}
        arguments, mask = self.inputs.of(ids, ids.device)
        tokens: Any = self.model(**arguments).last_hidden_state
        return {name: pool(tokens, mask, how) for name, how in self.poolings.items()}
