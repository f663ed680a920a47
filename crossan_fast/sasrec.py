"""SASRec (arXiv 1808.09781) by ids, the baseline that knows nothing of what items are.

It is `CrossanModel` with a vector an item in place of towers, heads and fusion: sequence encoder, loss and
evaluation are the same code, so that a comparison differs by the items' embeddings alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from crossan_fast import _scores
from crossan_fast._sources import Gathered, ReadAhead, Source
from crossan_fast.config import CrossanConfig
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
        modality_dropout=0.0,
        modality_dropout_scope="item",
    )


class SasRec(CrossanModel):
    """A vector for each item of a catalogue, and `CrossanModel`'s sequence encoder and loss over them.

    A cache only says which items there are. A vector that training never moved stays what it began as: cold
    items are out of its reach.

    Args:
        config: of the sequence encoder and the loss; see `by_ids`.
        num_items: I; rows 1 to I of `items`, row 0 is padding's.
        backend: as `CrossanModel` takes it.
    """

    def __init__(self, config: CrossanConfig, num_items: int, backend: str = "auto") -> None:
        super().__init__(config, backend)
        del self.towers, self.heads, self.fusion
        self.items = nn.Embedding(num_items + 1, config.embedding_dim)
        nn.init.xavier_normal_(self.items.weight)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Refused: a folder's config.json has no place for the kind of model, and would load as another."""
        raise ValueError(
            f"folder: SasRec is not saved as a model's folder, got {folder}; torch.save its state_dict()"
        )

    def _read(self, cache: HiddenStateCache, ids: Tensor, ahead: ReadAhead) -> Source:
        return Source((), None, None, None, ids)

    def _encode_ids(self, cache: HiddenStateCache, ids: Tensor, gathered: Gathered | None) -> Tensor:
        return self._encode(self._read(cache, ids, ReadAhead()), None)[0]

    def _embed(self, source: Source) -> Tensor:
        if source.items is None:
            raise ValueError("item_ids: SASRec knows items by nothing else, expected them, got none")
        vectors: Tensor = self.items(source.items)
        return vectors

    def _fuse(
        self, embeddings: Tensor, source: Source, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return _scores.as_items(self.config, embeddings), None
