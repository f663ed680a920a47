"""SASRec (arXiv 1808.09781) by ids, the baseline that knows nothing of what items are.

It is `CrossanModel` with a vector an item in place of towers, heads and fusion: sequence encoder, loss and
evaluation are the same code, so that a comparison differs by the items' embeddings alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from crossan_fast import _scores
from crossan_fast._sources import Gathered, ReadAhead, Source
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.model import CrossanModel

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache


def by_ids(config: CrossanConfig) -> CrossanConfig:
    """`config` without its choices of how items are embedded; sequence encoder, loss and scores stay.

    The modalities stay, too: an item with none of them is no candidate of the model to compare with.
    """
    return replace(
        config,
        architecture="crossan",
        cross="none",
        cross_projection="identity",
        head="one",
        fusion="concat",
        top_k=None,
        load_balance=0.0,
        id_embedding=False,
        id_fusion="expert",
        modality_dropout=0.0,
        modality_dropout_scope="item",
    )


class SasRec(CrossanModel):
    """A vector for each item of a catalogue, and `CrossanModel`'s sequence encoder and loss over them.

    A cache only says which items there are. A vector that training never moved stays what it began as, or
    decays to nothing (`optimizer.id_weight_decay`): cold items are out of its reach.

    Args:
        config: of the sequence encoder and the loss; see `by_ids`.
        num_items: I; rows 1 to I of `items`, row 0 is padding's.
        backend: as `CrossanModel` takes it.
    """

    _reads_states = False

    def __init__(self, config: CrossanConfig, num_items: int, backend: str = "auto") -> None:
        super().__init__(config, backend)
        del self.towers, self.heads, self.fusion
        self.items = nn.Embedding(num_items + 1, config.embedding_dim)
        nn.init.xavier_normal_(self.items.weight)

    # -- refused: what a model of towers and fusion can -------------------------------------------------

    def save_pretrained(self, folder: str | Path, **options: Any) -> NoReturn:
        """Refused: a folder's config.json has no place for the kind of model, and would load as another."""
        raise ValueError(
            f"folder: SasRec is not saved as a model's folder, got {folder}; torch.save its state_dict()"
        )

    def push_to_hub(self, repo_id: str, **push: Any) -> NoReturn:
        """Refused as `save_pretrained` is, before a repository is made."""
        raise ValueError(f"repo_id: SasRec is not saved as a model's folder, got {repo_id}")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> NoReturn:
        """Refused: no folder holds one."""
        raise ValueError(
            f"folder: SasRec is not loaded from a model's folder, got {folder}; make one of by_ids(config) "
            "and the number of items, and load its state dict"
        )

    @classmethod
    def from_iisan(cls, state_dict: Mapping[str, Tensor], **options: Any) -> NoReturn:
        """Refused: IISAN's weights are of towers."""
        raise ValueError("state_dict: SasRec has no place for IISAN's weights; CrossanModel.from_iisan has")

    def extend(self, modality: Modality, **options: Any) -> NoReturn:
        """Refused: items have no modalities here."""
        raise ValueError(f"modality: SasRec has no towers to add one to, got {modality}")

    def remove(self, name: str) -> NoReturn:
        """Refused as `extend` is."""
        raise ValueError(f"name: SasRec has no towers to remove one of, got {name!r}")

    def explain(self, items: Sequence[str | int] | None, cache: HiddenStateCache) -> NoReturn:
        """Refused: there is neither a gate nor an expert."""
        raise ValueError("items: SasRec has no gates and no experts, there is nothing of them to explain")

    # -- inside ----------------------------------------------------------------------------------------

    def _read(self, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
        # The last row that a training step's ids may name; `forward` compares the ids themselves with it.
        self._require_vectors(cache.num_items if self.catalogue is None else self.catalogue.num_items)
        return Source((), None, None, None, ids)

    def _in_parts(
        self, cache: HiddenStateCache, ids: Tensor, size: int
    ) -> Iterator[tuple[Tensor, Gathered | None]]:
        if cache.num_items >= len(self.items.weight) and ids.numel():  # it grew: a GPU is waited for
            self._require_vectors(int(ids.max()))
        return ((part, None) for part in ids.split(size))

    def _encode_ids(self, cache: HiddenStateCache, ids: Tensor, gathered: Gathered | None) -> Tensor:
        return self._encode(Source((), None, None, None, ids), None)[0]

    def _require_vectors(self, last: int) -> None:
        """Raise unless item `last` has a vector."""
        if last >= (rows := len(self.items.weight)):
            raise ValueError(
                f"cache: SasRec has vectors for items 1 to {rows - 1:,}, got item {last:,}; of a cache that "
                "grew, items behind those have to be trained by a new one"
            )

    def _embed(self, source: Source) -> Tensor:
        if source.items is None:
            raise ValueError("item_ids: SASRec knows items by nothing else, expected them, got none")
        vectors: Tensor = self.items(source.items)
        return vectors

    def _fuse(
        self, embeddings: Tensor, source: Source, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return _scores.as_items(self.config, embeddings), None
