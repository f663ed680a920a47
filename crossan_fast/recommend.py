"""From histories of items to the next ones."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast import ops
from crossan_fast._checks import FLOATS, check_integer, check_tensor, nearest, refuse_path
from crossan_fast._finite import refuse_nonfinite_items
from crossan_fast._modes import evaluating
from crossan_fast._sources import bare_in
from crossan_fast.data.splits import last_items
from crossan_fast.ops.topk_scores import TopK

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.model import CrossanModel

Ints = npt.NDArray[np.int64]
Unknown = Literal["skip", "error"]
# Users at once: their histories, and k items each, are all that is held beside the catalogue.
BATCH = 1024


@dataclass(frozen=True)
class Recommendation:
    """Attributes:
    item: its row in the cache.
    name: its name there.
    score: inner product of user and item, as the config's `scores` has it; comparable within one user only.
    """

    item: int
    name: str
    score: float


class Recommendations(list[list[Recommendation]]):
    """The items of each history, best first."""

    def to_frame(self) -> Any:
        """A pandas frame with a row an item: history (its number from 0), rank from 1, item, score.

        Raises:
            ImportError: no pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(f"to_frame: expected pandas, which cannot be imported ({error})") from error
        rows = [
            (number, rank, best.name, best.score)
            for number, items in enumerate(self)
            for rank, best in enumerate(items, start=1)
        ]
        return pandas.DataFrame(rows, columns=["history", "rank", "item", "score"])


class Recommender:
    """Ranks a cache's items for batches of histories; the catalogue is encoded once, here, and again where
    the model's weights have changed since.

    Args:
        model: put in evaluation mode for each call.
        cache: every item of it that has one of the model's modalities is a candidate, those appended after
            training too.
        k: how many; at most the number of candidates. Fewer come back where the history leaves fewer.
        filter_history: leave out the history's own items.
        allow, deny: the only candidates, and those that are none: names or rows of the cache. Histories may
            hold any item.
        unknown: what to do about a name that the cache lacks, or an item without any modality, in a history
            or in `allow` and `deny`: raise, or `skip` it and count it in `skipped`.
        items: `[I + 1, d]` where the cache's items are encoded already (`model.encode_catalogue`).

    Attributes:
        skipped: names that were passed over so far.

    Raises:
        ValueError: k below 1 or above the number of candidates, no candidates, a wrong row, an item without
            any modality in a history or in `allow`, `items` of another size or device; when it ranks, an
            item's or a user's embedding that is not finite, weights that have changed since `items` were
            given.
        KeyError: an unknown name, with the nearest known one.
    """

    def __init__(
        self,
        model: CrossanModel,
        cache: HiddenStateCache,
        *,
        k: int = 10,
        filter_history: bool = True,
        allow: Collection[str | int] | None = None,
        deny: Collection[str | int] | None = None,
        unknown: Unknown = "error",
        items: Tensor | None = None,
    ) -> None:
        if unknown not in (known := get_args(Unknown)):
            raise ValueError(
                f"unknown: expected one of {known}, got {unknown!r}{nearest(str(unknown), known)}"
            )
        if not isinstance(filter_history, bool | np.bool_):  # as "none", which is an evaluation's
            raise TypeError(f"filter_history: expected true or false, got {filter_history!r}")
        refuse_path(cache)
        self.model, self.cache = model, cache
        self.skipped = 0
        self._filter, self._unknown = filter_history, unknown
        bare = bare_in(model.config, cache, torch.device("cpu"))
        self._bare = frozenset() if bare is None else frozenset(bare.nonzero().flatten().tolist())
        self._candidates = self._chosen(allow, deny)
        total = cache.num_items if self._candidates is None else len(self._candidates)
        if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= operator.index(k) <= total:
            raise ValueError(f"k: expected 1 to {total}, the number of candidates, got {k!r}")
        self.k = operator.index(k)
        if items is not None:
            shape = (cache.num_items + 1, model.config.embedding_dim)
            check_tensor("items", items, shape, dtypes=FLOATS, device=model.item_popularity.device)
        self._given, self._weights = items, _present_weights(model)

    @property
    def items(self) -> Tensor:
        """`[I + 1, d]`, encoded when first needed, and by the weights that users are encoded by."""
        if (present := _present_weights(self.model)) != self._weights:
            if self._given is not None:
                raise ValueError(
                    "items: expected a model that is as it was when they were given, got other "
                    "weights since: encode them again, and make another Recommender"
                )
            self._weights = present
            for made in ("_items", "_ranked"):
                self.__dict__.pop(made, None)
        return self._items

    @cached_property
    def _items(self) -> Tensor:
        items = self.model.encode_catalogue(self.cache) if self._given is None else self._given
        refuse_nonfinite_items(items, self.cache.item_names)
        return items

    @cached_property
    def _ranked(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Candidates `[C + 1, d]`; and where they are not all items, each one's row and each row's place."""
        items = self._items
        if self._candidates is None:
            return items, None, None
        rows = torch.from_numpy(np.concatenate([[0], self._candidates])).to(items.device)
        place = torch.zeros(len(items), dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return items[rows], rows, place

    def row(self, item: str | int) -> int:
        """The cache's row of an item, 0 for one that is skipped: unknown, or without any modality."""
        row = self._known_row(item)
        if row not in self._bare:
            return row
        if self._unknown == "error":
            raise ValueError(self._said_bare(row))
        self.skipped += 1
        return 0

    def _known_row(self, item: str | int) -> int:
        if not isinstance(item, str):
            if isinstance(item, bool) or not hasattr(item, "__index__"):
                raise TypeError(f"expected an item's name or row, got {item!r}")
            if not 1 <= (row := operator.index(item)) <= self.cache.num_items:
                raise ValueError(f"expected rows 1 to {self.cache.num_items}, got {item}")
            return row
        if self._unknown == "error":
            try:
                return self.cache.row_of(item)
            except KeyError as error:
                told, way = str(error.args[0]), "; unknown='skip' (--unknown skip) passes over such names"
                raise KeyError(told if "did you mean" in told else told + way) from None
        row = self._row_of.get(item, 0)
        self.skipped += row == 0
        return row

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.cache.item_names) if row}

    @torch.no_grad()
    def rank(self, ids: Ints, offsets: Ints) -> TopK:
        """The k best for each history `ids[offsets[b]:offsets[b + 1]]` of rows, oldest first, none empty.

        Returns:
            scores `[B, k]`, descending, and rows of the cache `[B, k]`; −inf and 0 where fewer are left.

        Raises:
            ValueError: an empty history, what is no row of the cache or has none of the model's modalities,
                an item's or a user's embedding that is not finite: it has no order.
        """
        if len(empty := np.flatnonzero(np.diff(offsets) < 1)):
            raise ValueError(f"offsets: expected at least one item a history, got none in {empty[0]}")
        if len(offsets) < 1 or offsets[0] < 0 or offsets[-1] > len(ids):
            raise ValueError(f"offsets: expected places 0 to {len(ids)} of ids, got {offsets}"[:200])
        return self._rank(ids, offsets, np.arange(len(offsets) - 1))

    def _rank(self, ids: Ints, offsets: Ints, numbers: Ints) -> TopK:
        """`rank`, of histories that an error calls by these numbers."""
        self._refuse_wrong_rows(ids)
        starts, ends = offsets[:-1], offsets[1:]
        items = self.items
        ranked, rows, place = self._ranked
        device = ranked.device
        recent = torch.from_numpy(last_items(ids, starts, ends, self.model.config.window)).to(device)
        with evaluating(self.model):
            users = self.model.encode_users(items[recent], recent != 0)[:, -1].contiguous()
        finite = torch.isfinite(users).all(dim=1)
        if not bool(finite.all()):
            number = int(numbers[int((~finite).nonzero()[0])])
            raise ValueError(f"model: the embedding of the user of history {number} is not finite")
        exclude = None
        if self._filter:
            longest = int((ends - starts).max())
            exclude = torch.from_numpy(last_items(ids, starts, ends, longest)).to(device)
            exclude = exclude if place is None else place[exclude]
        backend = self.model.backend_for("topk_scores")
        top = ops.topk_scores(users, ranked, self.k, exclude, backend=backend)
        return top if rows is None else TopK(top.scores, rows[top.ids])

    def _refuse_wrong_rows(self, ids: Ints) -> None:
        """Before they index: numpy and torch would count a negative one from the end."""
        wrong = ids[(ids < 1) | (ids > self.cache.num_items)]
        if wrong.size:
            raise ValueError(f"ids: expected rows 1 to {self.cache.num_items}, got {wrong[0]}")
        if self._bare and (bare := ids[np.isin(ids, list(self._bare))]).size:
            raise ValueError(self._said_bare(int(bare[0])))

    def _said_bare(self, row: int) -> str:
        names = list(self.model.config.modality_names)
        name = self.cache.item_names[row]
        return f"item {name!r} (row {row}) has no modality at all, expected at least one of {names}"

    def batches(self, ids: Ints, offsets: Ints, batch_size: int = BATCH) -> Iterator[tuple[Ints, TopK]]:
        """`rank` for any number of histories, some at once, with their numbers; empty ones are left out."""
        check_integer("batch_size", batch_size, 1)
        full = np.flatnonzero(np.diff(offsets))
        for start in range(0, len(full), batch_size):
            users = full[start : start + batch_size]
            first, last = offsets[users], offsets[users + 1]
            parts = [ids[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
            bounds = np.concatenate([[0], np.cumsum(last - first)])
            yield users, self._rank(np.concatenate(parts), bounds, users)

    def _chosen(self, allow: Collection[str | int] | None, deny: Collection[str | int] | None) -> Ints | None:
        for argument, given in (("allow", allow), ("deny", deny)):
            wrong = given is not None and not isinstance(given, Iterable)
            if wrong or isinstance(given, str | bytes):  # its letters may be names
                raise ValueError(f"{argument}: expected a list of item names or rows, got {given!r}")
        if allow is None and deny is None and not self._bare:
            return None
        kept = np.zeros(self.cache.num_items + 1, dtype=bool)
        kept[1:] = allow is None
        kept[[self.row(item) for item in allow or ()]] = True
        kept[[self._known_row(item) for item in deny or ()]] = False
        kept[[0, *self._bare]] = False
        if not kept.any():
            raise ValueError("allow, deny: expected a candidate, got none")
        return np.flatnonzero(kept)


def _present_weights(model: CrossanModel) -> list[tuple[int, int]]:
    """What differs once weights have changed: where each lies, and how often it was written to."""
    held = (*model.parameters(), *model.buffers())
    # Inference tensors keep no count: they do not train.
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in held]


def recommend(
    model: CrossanModel,
    histories: Iterable[Sequence[str | int]],
    cache: HiddenStateCache,
    *,
    k: int = 10,
    filter_history: bool = True,
    allow: Collection[str | int] | None = None,
    deny: Collection[str | int] | None = None,
    unknown: Unknown = "error",
) -> Recommendations:
    """The k best items for each history; users and items need not have been seen in training.

    Args:
        model: put in evaluation mode for the call.
        histories: item names, or rows of the cache (1 … I), oldest first; the last `window` count.
        cache, k, filter_history, allow, deny: see `Recommender`.
        unknown: raise for a name that the cache lacks, or `skip` it; a history of nothing else gets no items.

    Returns:
        A list for each history; `.to_frame()` makes one pandas frame of them.

    Raises:
        ValueError: an empty history, k below 1 or above the number of candidates, an embedding that is not
            finite.
        KeyError: an unknown item.
    """
    histories = list(histories)  # gone through twice
    found = Recommendations([] for _ in histories)
    recommender = Recommender(
        model, cache, k=k, filter_history=filter_history, allow=allow, deny=deny, unknown=unknown
    )
    rows = [_rows(history, index, recommender) for index, history in enumerate(histories)]
    ids = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    names = cache.item_names
    for numbers, top in recommender.batches(ids, offsets):
        for number, items, scores in zip(numbers, top.ids.tolist(), top.scores.tolist(), strict=True):
            # 0 fills up where fewer than k are left.
            pairs = ((item, score) for item, score in zip(items, scores, strict=True) if item)
            found[number] = [Recommendation(item, names[item], score) for item, score in pairs]
    return found


def _rows(history: Sequence[str | int], index: int, recommender: Recommender) -> list[int]:
    if isinstance(history, str | bytes) or not hasattr(history, "__len__") or not len(history):
        raise ValueError(f"histories[{index}]: expected at least one item name or row, got {history!r}")
    rows = []
    for place, item in enumerate(history):
        try:
            rows.append(recommender.row(item))
        except TypeError as error:
            raise TypeError(f"histories[{index}][{place}]: {error}") from None
        except ValueError as error:
            raise ValueError(f"histories[{index}]: {error}") from None
    return [row for row in rows if row]
