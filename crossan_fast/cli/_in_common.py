"""What of a cache's states is the same for every item, in words: centring would take it away."""

from __future__ import annotations

from pathlib import Path

import torch

from crossan_fast.cache.format import CacheError
from crossan_fast.cache.hidden_state_cache import HiddenStateCache

# It is told from so many runs of so many rows, and of so many items at least: of n with nothing in common the
# mean has 1 / n of the energy.
_RUNS, _RUN, _FEW = 16, 64, 20
# The share of energy that is worth a word.
_MUCH = 0.3


def say_what_is_in_common(folder: Path) -> None:
    """Print a line a modality, where there is one to print."""
    for name, line in in_common(HiddenStateCache.open(folder)).items():
        print(f"  {name}: {line}")


def in_common(cache: HiddenStateCache) -> dict[str, str]:
    """By modality, a line on what of its states says nothing of any item, where that is much."""
    # Some runs of rows, so that little of a large file is read and compared with its checksums.
    starts = torch.linspace(1, max(1, cache.num_items - _RUN + 1), _RUNS).long()
    rows = (starts[:, None] + torch.arange(_RUN)).unique()
    rows = rows[rows <= cache.num_items]
    try:
        found = cache.gather(rows, "cpu")
    except CacheError as error:
        return dict.fromkeys([m.name for m in cache.modalities][:1], f"not looked at: {error}")
    said = {}
    for column, (name, states) in enumerate(found.items()):
        states = states[cache.present[rows, column]].double()
        if len(states) < _FEW or name in cache.frames:
            continue
        energy = states.square().sum(dim=2).mean(dim=0)
        share = torch.where(energy > 0, states.mean(dim=0).square().sum(dim=1) / energy, 0).mean().item()
        if share >= _MUCH:
            said[name] = f"in common: {share:.0%} of the energy is the mean over items; see convert --centre"
    return said
