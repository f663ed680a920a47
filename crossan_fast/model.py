"""CrossanModel: side network -> fusion -> sequence encoder -> loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crossan_fast import _losses, _scores, _sources, iisan, ops
from crossan_fast._checks import check_integer, check_range, check_tensor, describe, refuse_path
from crossan_fast._finite import first_of_step
from crossan_fast._growing import SHARE, extend, remove
from crossan_fast._modes import evaluating
from crossan_fast._popularity import Popularity
from crossan_fast._profiling import span
from crossan_fast._sampling import Sampler
from crossan_fast._sources import CATALOGUE_CHUNK, Encoder, Gathered, ReadAhead, Source
from crossan_fast.cache.validate import check_ids
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.explain import explain
from crossan_fast.hub import Pretrained
from crossan_fast.modules.fusion import Momef, concat, make_concat, make_head
from crossan_fast.modules.id_embedding import IdEmbedding, rows_of
from crossan_fast.modules.linear import own
from crossan_fast.modules.sequence_encoder import SequenceEncoder
from crossan_fast.modules.side_network import SideNetwork
from crossan_fast.ops.in_batch_loss import refuse_without_negatives
from crossan_fast.output import CrossanOutput
from crossan_fast.recommend import Recommendations, Unknown, recommend

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache


class CrossanModel(Popularity, Pretrained):
    """CROSSAN (arXiv 2504.10307) or IISAN (arXiv 2404.02059) over cached hidden states.

    Args:
        config: what the model is.
        backend: `auto` picks per op and device (`crossan-fast doctor` shows what and why); `eager`, `cpp`,
            `triton` or `cuda` asks for one and raises where it can't serve.

    Attributes:
        item_popularity: buffer `[I + 1]`, each item's share of the training interactions; empty until
            `set_popularity`. Its rows have a `catalogue`, compared with that of every cache trained on.
        process_group: set it to share in-batch negatives with the other processes of the group
            (`crossan_fast.distributed`); None keeps to the process's own batch. ◊ The load-balance term
            stays each process's own.
        equal_batches: with a process group on GPUs, a promise that every process passes `item_ids` of one
            shape; negatives are then shared without waiting for the device.
    """

    # transformers' Trainer asks a model which of its inputs to count and to hand to metrics.
    main_input_name = "item_ids"
    # Whether items are made of a cache's states, which then have to be where the model is.
    _reads_states = True

    def __init__(self, config: CrossanConfig, backend: str = "auto") -> None:
        super().__init__()
        if not isinstance(config, CrossanConfig):
            raise TypeError(f"config: expected CrossanConfig, got {type(config).__name__}")
        ops.check_backend(backend)
        self.config = config
        self.backend = backend
        self.towers = SideNetwork(config)
        two_layers = config.head == "two"
        self.heads = nn.ModuleDict(
            {tower.name: make_head(tower.width, config.embedding_dim, two_layers) for tower in config.towers}
        )
        if config.id_embedding:
            self.id_embedding = IdEmbedding(config)
        self.fusion = Momef(config) if config.fusion == "momef" else make_concat(config)
        self.sequence_encoder = SequenceEncoder(config)
        self.process_group: torch.distributed.ProcessGroup | None = None
        self.equal_batches = False
        self._sampler = Sampler()

    # -- items and users -------------------------------------------------------------------------------

    def encode_items(
        self,
        states: Mapping[str, Tensor],
        present: Tensor | None = None,
        *,
        item_ids: Tensor | None = None,
    ) -> Tensor:
        """Item embeddings from dense states.

        Args:
            states: per modality name `[N, L, D_m]`, any floating type. For a model of a centred cache, or of
                one in a basis, as `cache.frames[name].project` gives them.
            present: bool `[N, M]` in the config's order of modalities; None: all present.
            item_ids: int64 `[N]`, rows of the catalogue, for `id_embedding`; None: all do without.

        Returns:
            `[N, d]`.

        Raises:
            ValueError, TypeError: names, shapes, dtypes or devices that do not fit; an item with no
                modality at all, by its row; on the CPU also NaN or inf in a present state. A GPU would have
                to be waited for: there they come out as embeddings that are not finite.
        """
        source = _sources.dense(self.config, states, present, leading=1)
        if present is not None:
            _sources.refuse_empty(present, "present: item at row {}")
        _sources.refuse_nonfinite(self.config, source, lambda row: f"in row {row}")
        if item_ids is not None:
            check_tensor("item_ids", item_ids, source.states[0].shape[:1], dtypes=(torch.int64,))
            check_range("item_ids", item_ids, 0)
        return self._encode(replace(source, items=item_ids), None)[0]

    def encode_users(self, items: Tensor, mask: Tensor) -> Tensor:
        """User vectors from item embeddings.

        Args:
            items: `[B, S, d]`, S at most the window.
            mask: bool `[B, S]`, True at real items, which stand at the end of each row.

        Returns:
            `[B, S, d]`, a vector for each prefix.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also a mask with
                padding behind a real item. A GPU would have to be waited for: there it gives such rows zeros
                at the last place.
        """
        check_tensor("items", items, (None, None, self.config.embedding_dim))
        check_tensor("mask", mask, (None, None), dtypes=(torch.bool,), device=items.device)
        if items.shape[:2] != mask.shape:
            raise ValueError(f"mask: expected {list(items.shape[:2])} as in items, got {describe(mask)}")
        if items.shape[1] > self.config.window:
            raise ValueError(
                f"items: expected at most window={self.config.window} places, got {describe(items)}"
            )
        _sources.refuse_padding_behind(mask)
        with span("sequence_encoder"):
            users = self.sequence_encoder(items, mask, backend=self.backend_for("sequence_encoder"))
        return _scores.as_users(self.config, users)

    def encode_catalogue(
        self, cache: HiddenStateCache, *, ids: Tensor | None = None, batch_size: int = CATALOGUE_CHUNK
    ) -> Tensor:
        """Embeddings of the cache's items without gradient, `[I + 1, d]` (or of `ids`).

        Zeros for row 0, and for an item with none of the model's modalities.
        """
        device = self._device()
        refuse_path(cache)
        self._require_rows(cache)
        check_integer("batch_size", batch_size, 1)
        if ids is None:
            ids = torch.arange(cache.num_items + 1, device=device)
        check_ids(ids, cache.num_items)
        with evaluating(self), torch.no_grad():
            chunks = [self._encode_ids(cache, *part) for part in self._in_parts(cache, ids, batch_size)]
        if not chunks:
            return torch.zeros(0, self.config.embedding_dim, device=device)
        bare = _sources.bare_in(self.config, cache, device)
        empty = ids == 0 if bare is None else (ids == 0) | bare[ids]
        return torch.where(empty[:, None], 0, torch.cat(chunks))

    # -- training --------------------------------------------------------------------------------------

    def forward(
        self,
        item_ids: Tensor,
        states: Mapping[str, Tensor] | None = None,
        *,
        cache: HiddenStateCache | None = None,
        present: Tensor | None = None,
        gathered: Gathered | None = None,
        capacity: int | None = None,
        encoders: Sequence[Encoder] | None = None,
        return_loss: bool = True,
    ) -> CrossanOutput:
        """One training step's loss.

        Args:
            item_ids: int64 or int32 `[B, S + 1]`, left-padded with 0.
            states: per modality `[B, S + 1, L, D_m]`; places of one id hold the same states.
            cache: in place of `states`: rows are read by id. Of one that grew behind `set_popularity`'s
                catalogue, ids name the rows that were known then, and a warning says so once.
            present: with `states`, bool `[B, S + 1, M]`; None: all present.
            gathered: with `cache`, the states of the batch's distinct ids as `ops.deduplicate(item_ids).ids`
                has them, where `cache.prefetch` (`{name: [U, L, D_m]}`) or `cache.prefetch_stored` read them
                ahead.
            capacity: how many distinct ids there are at most, padding counted; where it is known, a GPU need
                not work on a slot for every place.
            encoders: in place of `states`, with `loss="in_batch"`: called without gradient, once a step, with
                the batch's distinct ids `[U]` (0: padding); together they give every modality `[U, L, D_m]`.
            return_loss: always true, by which transformers' Trainer sees that there is a loss without labels.

        Raises:
            ValueError, TypeError: arguments that do not fit, named; a cache whose rows are not those of
                `item_popularity`; on the CPU also no row with a target, or, in batch, none with a negative;
                ids out of range; NaN or inf in `states` (a cache checks its rows itself). A GPU would have to
                be waited for: there the loss is 0, or NaN.
        """
        if not return_loss:
            raise ValueError("return_loss: expected true, the output always has its loss; got false")
        _sources.check_ids(self.config, item_ids, self._device(), self.process_group is None)
        _sources.check_given(states, cache, present, gathered, encoders, self.config.loss)
        item_ids, ahead = item_ids.to(torch.int64), ReadAhead(gathered, capacity)
        known = self._known_items(cache, self.config.loss != "full" or self.config.id_embedding)
        if known is not None:
            _sources.check_range(item_ids, known, cache)
        if cache is not None and item_ids.device.type == "cpu":  # as in check_ids
            _sources.refuse_bare(self.config, cache, item_ids, "item_ids")
        if self.config.loss == "full":  # every item is encoded: there is nothing to deduplicate
            return _losses.full(self, item_ids, cache, known)
        if self.config.loss == "sampled":
            return _losses.sampled(self, item_ids, cache, known, ahead)
        unique = ops.deduplicate(item_ids, ahead.slots(item_ids), backend=self.backend_for("deduplicate"))
        if cache is None:
            source = _sources.without_cache(self.config, states, present, encoders, unique)
        else:
            source = self._read(cache, unique.ids, ahead)
        if item_ids.device.type == "cpu" and self.process_group is None:  # as in check_ids
            refuse_without_negatives(item_ids, unique)
        source = _losses.dropped(self, source, unique.ids)
        if not self.config.deduplicate:
            return _losses.by_place(self, item_ids, unique, source)
        return _losses.in_batch(self, item_ids, unique, self._encoded(item_ids, unique, source))

    if TYPE_CHECKING:
        __call__ = forward

    def _read(self, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
        return _sources.read(self.config, cache, ids, ahead)

    def _encoded(self, item_ids: Tensor, unique: ops.Deduplicated, source: Source) -> _losses.Encoded:
        slots, histories, mask, log_popularity = unique.slots, None, None, None
        if _losses.drops(self, "history"):
            histories, embeddings, balance = _losses.thinned(self, unique, source)
            by_place = rows_of(embeddings, slots)
        else:
            embeddings, balance = self._encode(source, unique.counts)
            if item_ids.device.type == "cpu":
                by_place = rows_of(embeddings, slots)
            elif self.config.loss == "sampled":  # its columns need no popularity, or another
                by_place, histories = rows_of(embeddings, slots), embeddings[slots[:, :-1]]
            else:
                backend = self.backend_for("batch_rows")
                embeddings, histories, by_place, mask, log_popularity = ops.batch_rows(
                    embeddings, slots, unique.ids, self._known_shares(), backend=backend
                )
        histories = by_place[:, :-1] if histories is None else histories
        users = self.encode_users(histories, item_ids[:, :-1] != 0 if mask is None else mask)
        return _losses.Encoded(users, by_place, embeddings, balance, log_popularity)

    def check_finite(self, output: CrossanOutput | None = None) -> None:
        """Raise for the first tensor that holds NaN or inf: for a training loop of one's own.

        Between `loss.backward()` and the optimizer's step it keeps a bad batch out of the weights:

            output = model(item_ids, cache=cache)
            output.loss.backward()
            model.check_finite(output)

        Parameters and buffers come first, then what `output` holds, then gradients: what is named is the
        cause of what follows it. Every tensor is read, and a GPU is waited for.

        Args:
            output: what the model gave for the batch; None: nothing of it is looked at.

        Raises:
            ValueError: naming the tensor, its first bad entry and how many there are.
        """
        if found := first_of_step(self, {} if output is None else dict(output)):
            raise ValueError(found)

    # -- backends --------------------------------------------------------------------------------------

    def backend_for(self, op: str, device: torch.device | None = None) -> str:
        """What to ask of an op as `backend=`, wherever it is called for this model.

        A backend asked for by name holds for every op that it has; the others stay automatic.

        Args:
            op: one of `ops`' names.
            device: where the call runs, for what the host does on behalf of a model elsewhere: a backend of
                the model's device says nothing of another's, but eager is eager.
        """
        if device is not None and device.type != self._device().type:
            return "eager" if self.backend == "eager" else "auto"
        return self.backend if ops.has_kernel(op, self.backend) else "auto"

    # -- loading and recommending ----------------------------------------------------------------------

    @classmethod
    def from_iisan(cls, state_dict: Mapping[str, Tensor], *, backend: str = "auto") -> CrossanModel:
        """A model with the weights of IISAN's public code; see `crossan_fast.iisan`."""
        return iisan.load_iisan(cls, state_dict, backend)

    def recommend(
        self,
        histories: Iterable[Sequence[str | int]],
        cache: HiddenStateCache,
        *,
        k: int = 10,
        filter_history: bool = True,
        allow: Collection[str | int] | None = None,
        deny: Collection[str | int] | None = None,
        unknown: Unknown = "error",
    ) -> Recommendations:
        """The k best items for each history; see `crossan_fast.recommend`."""
        return recommend(
            self,
            histories,
            cache,
            k=k,
            filter_history=filter_history,
            allow=allow,
            deny=deny,
            unknown=unknown,
        )

    def extend(self, modality: Modality, *, share: float = SHARE, freeze: bool = True) -> CrossanModel:
        """A copy with one more modality, which starts where this model is: to rounding, or to `share`.

        Its cross gates are closed, and with `concat` its columns zero. Train with a cache that has it.

        Args:
            share: ◊ at most what MOMEF gives the new expert at first, where an item has every modality.
            freeze: the towers and heads that are here need no gradient, until `requires_grad_(True)`.
        """
        return extend(self, modality, share, freeze)

    def remove(self, name: str) -> CrossanModel:
        """A copy without a modality: what this model is on items that lack it. Refused for IISAN's pairs."""
        return remove(self, name)

    def explain(self, items: Sequence[str | int] | None, cache: HiddenStateCache) -> dict[str, Any]:
        """Gates of the levels, and expert weights of the items; see `crossan_fast.explain`."""
        return explain(self, items, cache)

    # -- inside ----------------------------------------------------------------------------------------

    def _encode(self, source: Source, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._fuse(self._embed(source), source, counts)

    def _embed(self, source: Source) -> Tensor:
        with span("side_network"):
            return self.towers(
                source.states,
                self.heads,
                ids=source.ids,
                scales=source.scales,
                present=source.present,
                backend=self.backend_for("side_network"),
            )

    def _fuse(
        self, embeddings: Tensor, source: Source, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        with span("fusion"):
            present, ids = source.present, self.id_embedding
            if ids is not None and self.config.id_expert:
                embeddings, present = ids(embeddings, present, source.items)
            balance = None
            if self.config.fusion == "concat":
                items = concat(self.fusion, embeddings)
            else:
                fused = own(self.fusion)(
                    embeddings,
                    present=present,
                    counts=counts,
                    balance=bool(self.config.load_balance),
                    backend=self.backend_for("fusion"),
                )
                items, balance = fused.items, fused.balance
            if ids is not None and not self.config.id_expert:
                items = ids.added_to(items, source.items)
        return _scores.as_items(self.config, items), balance

    def _in_parts(
        self, cache: HiddenStateCache, ids: Tensor, size: int
    ) -> Iterator[tuple[Tensor, Gathered | None]]:
        device = self._device()
        _sources.place(cache, device)
        return _sources.in_parts(cache, device, ids, size)

    def _encode_ids(self, cache: HiddenStateCache, ids: Tensor, gathered: Gathered | None) -> Tensor:
        source = _sources.cached(self.config, cache, self._device(), ids, gathered)
        return self._encode(source, None)[0]

    def _device(self) -> torch.device:
        return next(self.parameters()).device
