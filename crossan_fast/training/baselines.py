"""What a model has to beat, under the model's own protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast._modes import evaluating
from crossan_fast.cache import HiddenStateCache
from crossan_fast.data import Split
from crossan_fast.model import CrossanModel
from crossan_fast.training.evaluation import Protocol, candidates_for, held_out
from crossan_fast.training.processes import Processes
from crossan_fast.training.result import Part, Result
from crossan_fast.training.train_config import FilterHistory


def evaluate_baselines(
    model: CrossanModel,
    cache: HiddenStateCache,
    split: Split,
    part: Part = "test",
    *,
    k: Sequence[int] = (5, 10, 20),
    filter_history: FilterHistory = "all_except_target",
    candidates: Tensor | None = None,
    batch_size: int = 1024,
    lists: bool = False,
) -> dict[str, Result]:
    """Two recommenders that learn nothing of sequences, on the targets of `evaluate`; arguments as there.

    Returns:
        `popularity`: items by their training interactions. `last item's neighbours`: items by the cosine of
        the model's embedding of them and that of the user's last item, which itself is a candidate where
        `filter_history` leaves it one. Diversity is by the model's embeddings for both.
    """
    candidates = candidates_for(model.config, cache, split, part, candidates)
    protocol = Protocol(
        cache, split, part, tuple(k), filter_history, candidates, batch_size, lists, Processes()
    )
    with evaluating(model):
        items = protocol.embedded(model)
    inputs = held_out(split, part)[0]
    counts = torch.zeros(len(items), 1, device=items.device)
    counts[: split.num_items + 1, 0] = split.train_counts.to(counts.dtype)
    unit = torch.nn.functional.normalize(items, dim=1)

    def everyone(rows: slice) -> Tensor:
        return counts.new_ones(rows.stop - rows.start, 1)

    def last(rows: slice) -> Tensor:
        return unit[inputs[rows, -1]]

    return {
        "popularity": protocol.judge(everyone, counts, items, model.backend_for),
        "last item's neighbours": protocol.judge(last, unit, items, model.backend_for),
    }
