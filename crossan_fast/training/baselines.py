"""What a model has to beat, under the model's own protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossan_fast._checks import cutoffs_of, nearest
from crossan_fast._modes import evaluating
from crossan_fast.cache import HiddenStateCache
from crossan_fast.data import Split
from crossan_fast.model import CrossanModel
from crossan_fast.sasrec import SasRec
from crossan_fast.training.evaluation import Protocol, candidates_for, held_out
from crossan_fast.training.processes import Processes
from crossan_fast.training.ranking import Users, users_of
from crossan_fast.training.result import Part, Result
from crossan_fast.training.train_config import FilterHistory

# By the names that they are asked for: what results call them.
BASELINES = {
    "popularity": "popularity",
    "neighbours": "last item's neighbours",
    "sasrec": "SASRec by ids",
}
UNTRAINED = ("popularity", "neighbours")


def evaluate_baselines(
    model: CrossanModel,
    cache: HiddenStateCache,
    split: Split,
    part: Part = "test",
    *,
    names: Sequence[str] = UNTRAINED,
    sasrec: SasRec | None = None,
    k: int | Sequence[int] = (5, 10, 20),
    filter_history: FilterHistory = "all_except_target",
    candidates: Tensor | None = None,
    batch_size: int = 1024,
    lists: bool = False,
) -> dict[str, Result]:
    """Other recommenders on the targets of `evaluate`; arguments as there, and:

    Args:
        names: of `popularity`, `neighbours` and `sasrec`; the first two learn nothing of sequences.
        sasrec: the model of `train_sasrec`, where it is asked for.

    Returns:
        `popularity`: items by their training interactions. `last item's neighbours`: items by the cosine of
        the model's embedding of them and that of the user's last item, which itself is a candidate where
        `filter_history` leaves it one. `SASRec by ids`: what `sasrec` says. Diversity is by the embeddings of
        `model` for all of them.

    Raises:
        ValueError: an unknown name; `sasrec` without its model, or the model without its name; else as
            `evaluate`.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(
                f"names: expected some of {list(BASELINES)}, got {name!r}{nearest(name, BASELINES)}"
            )
    if "sasrec" in names and sasrec is None:
        raise ValueError("sasrec: expected the model of train_sasrec, which names asks for, got None")
    if sasrec is not None and "sasrec" not in names:
        raise ValueError(f"sasrec: goes with 'sasrec' among names, got {list(names)}")
    candidates = candidates_for(model.config, cache, split, part, candidates)
    protocol = Protocol(
        cache, split, part, cutoffs_of("k", k), filter_history, candidates, batch_size, lists, Processes()
    )
    with evaluating(model):
        items = protocol.embedded(model)
    inputs = held_out(split, part)[0]
    found = {}
    for name in dict.fromkeys(names):
        if name == "sasrec" and sasrec is not None:
            with evaluating(sasrec):
                own = protocol.embedded(sasrec)
                users = users_of(sasrec, own, inputs)
                found[BASELINES[name]] = protocol.judge(users, own, items, sasrec.backend_for)
            continue
        users, ranked = (_popularity if name == "popularity" else _neighbours)(split, items, inputs)
        found[BASELINES[name]] = protocol.judge(users, ranked, items, model.backend_for)
    return found


def _popularity(split: Split, items: Tensor, inputs: Tensor) -> tuple[Users, Tensor]:
    """Everyone's vector is [1], an item's its training interactions."""
    counts = torch.zeros(len(items), 1, device=items.device)
    counts[: split.num_items + 1, 0] = split.train_counts.to(counts.dtype)

    def everyone(rows: slice) -> Tensor:
        return counts.new_ones(rows.stop - rows.start, 1)

    return everyone, counts


def _neighbours(split: Split, items: Tensor, inputs: Tensor) -> tuple[Users, Tensor]:
    """A user's vector is that of the last item, all of them unit vectors."""
    unit = torch.nn.functional.normalize(items, dim=1)

    def last(rows: slice) -> Tensor:
        return unit[inputs[rows, -1]]

    return last, unit
