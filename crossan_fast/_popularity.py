"""A model's popularity: shares of the training interactions, by the rows of one catalogue."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crossan_fast._checks import check_tensor, describe
from crossan_fast.data import Catalogue, Split
from crossan_fast.modules.id_embedding import IdEmbedding

if TYPE_CHECKING:
    from crossan_fast.cache import HiddenStateCache

_HINT = (
    "; set_popularity takes a split of interactions that were read with this cache's item_names and "
    "catalogue='all'"
)
_BUFFERS = ("item_popularity", "catalogue_digest")


class Popularity(nn.Module):
    """What a model knows of its items by row; the base of `CrossanModel`.

    Attributes:
        item_popularity: buffer `[I + 1]`, each item's share of the training interactions; empty until
            `set_popularity`. Never in 16 bits, whatever the model is cast to.
        catalogue_digest: buffer uint8 `[32]`, what these rows mean; empty where that is unknown.
    """

    item_popularity: Tensor
    catalogue_digest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("item_popularity", torch.empty(0))
        self.register_buffer("catalogue_digest", _to_buffer(None))
        self.id_embedding: IdEmbedding | None = None
        self._catalogue: Catalogue | None = None
        self._warned_of = 0

    @property
    def catalogue(self) -> Catalogue | None:
        """What the rows of `item_popularity` mean; None where that is unknown."""
        return self._catalogue

    @torch.no_grad()
    def set_popularity(
        self, counts: Split | Tensor | Sequence[int], catalogue: Catalogue | None = None
    ) -> None:
        """Set `item_popularity`, and the items of an `id_embedding`, from each item's training interactions.

        Args:
            counts: a split, for its counts and its catalogue; or `[I + 1]`, not negative; entry 0 (padding)
                is ignored. They may be fractions, say where old interactions count less, but no shares. ◊ An
                item without an interaction counts as if it had one, or as the least of the others where that
                is less, so that its logit stays finite.
            catalogue: what the rows of plain counts mean: the `catalogue` of interactions or of a cache. It
                is saved with the model and compared with that of every cache it trains on; None: unknown,
                and a cache must have as many items as there are counts.

        ◊ Of an id embedding an item without an interaction is absent. Called again, say with a catalogue that
        grew, rows keep their vectors.
        """
        if catalogue is not None and not isinstance(catalogue, Catalogue):
            raise TypeError(f"catalogue: expected a Catalogue, got {describe(catalogue)}")
        if isinstance(counts, Split):
            if catalogue is not None:
                raise ValueError("catalogue: goes with plain counts; a split has its own")
            catalogue = counts.catalogue
            counts = counts.train_counts
        share, device = _shares(counts, catalogue), self.item_popularity.device
        self.item_popularity = share.to(device, torch.float32)
        self.catalogue_digest = _to_buffer(catalogue).to(device)
        self._catalogue = catalogue
        if self.id_embedding is not None:
            self.id_embedding.allocate(torch.as_tensor(counts, device="cpu") > 0)

    def _known_items(self, cache: HiddenStateCache | None, read: bool) -> int | None:
        """The last row that ids may name: of the cache and of the popularity; None where neither has one.

        Args:
            read: whether the loss reads the popularity.

        Raises:
            ValueError: rows of the popularity that are not the cache's first ones, or cannot be told to be.
        """
        held = self.item_popularity.numel()
        if self.id_embedding is not None and not held:
            raise ValueError("id_embedding: needs set_popularity(counts) first")
        if cache is None:
            return held - 1 if held else None
        if self._catalogue is None:
            if held and read and held != cache.num_items + 1:
                raise ValueError(
                    f"item_popularity: expected a share for each of the cache's {cache.num_items:,} items, "
                    f"got {held - 1:,} of an unknown catalogue{_HINT}"
                )
            return cache.num_items
        cache.catalogue.require(self._catalogue, "item_popularity", _HINT)
        known = self._catalogue.num_items
        if known < cache.num_items != self._warned_of and not torch.compiler.is_compiling():
            self._warned_of = cache.num_items
            warnings.warn(
                f"cache: it has grown to {cache.num_items:,} items; the model trains on the {known:,} that "
                "its popularity knows, until set_popularity is called with a split of all of them",
                stacklevel=5,  # behind Module.__call__
            )
        return known

    def _known_shares(self) -> Tensor:
        if self.item_popularity.numel() == 0:
            raise ValueError("item_popularity: loss='in_batch' needs set_popularity(counts) first")
        return self.item_popularity

    def _log_popularity(self, ids: Tensor) -> Tensor:
        return torch.log(self._known_shares()[ids])

    def _require_rows(self, cache: HiddenStateCache) -> None:
        """Raise ValueError where a cache's rows are not those of the id embedding, grown ones apart."""
        held = self.item_popularity.numel()
        if self.id_embedding is None or not held:
            return
        if self._catalogue is not None:
            cache.catalogue.require(self._catalogue, "id_embedding", _HINT)
        elif held != cache.num_items + 1:
            raise ValueError(
                f"id_embedding: expected a row for each of the cache's {cache.num_items:,} items, got "
                f"{held - 1:,} of an unknown catalogue{_HINT}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Popularity:
        """Casts and moves, as `half` and `to` make them; the popularity is never rounded to 16 bits.

        In fp16 a rare item's share would be 0 and its log infinite; in bf16 shares would be off by up to
        0.4 %, and stay so when the model is cast back.
        """
        held = self.item_popularity
        super()._apply(fn, recurse)
        if (cast := self.item_popularity).itemsize < torch.float32.itemsize:
            self.item_popularity = held.to(cast.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        popularity = state_dict.get(prefix + _BUFFERS[0])
        if popularity is not None:
            digest = state_dict.setdefault(prefix + _BUFFERS[1], _to_buffer(None))
            # The catalogue's size is not part of the config: buffers take the sizes that were saved.
            for name, saved in zip(_BUFFERS, (popularity, digest), strict=True):
                if saved.shape != getattr(self, name).shape:
                    setattr(self, name, getattr(self, name).new_empty(saved.shape))
            self._catalogue = _from_buffers(popularity, digest)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _shares(counts: Tensor | Sequence[int], catalogue: Catalogue | None) -> Tensor:
    try:
        tensor = torch.as_tensor(counts, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts: expected a Split, or [I + 1] numbers, got {describe(counts)}") from error
    check_tensor("counts", tensor, (None,))
    if tensor.numel() < 2 or not torch.isfinite(tensor).all() or (tensor < 0).any():
        raise ValueError(f"counts: expected [I + 1] finite counts of at least 0, got {describe(tensor)}")
    if catalogue is not None and catalogue.num_items != tensor.numel() - 1:
        raise ValueError(
            f"counts: expected [{catalogue.num_items + 1}] for {catalogue}, got {describe(tensor)}"
        )
    total = tensor[1:].sum()
    if total == 0:
        raise ValueError("counts: expected at least one interaction, got none")
    if tensor[1:].max() < 1:  # items never seen would outweigh all of them
        raise ValueError(
            f"counts: expected counts of interactions, got values below 1 (at most "
            f"{float(tensor[1:].max()):.6g}), such as shares; multiply them by the total"
        )
    least = tensor[1:][tensor[1:] > 0].min().clamp_max(1)
    # What decayed to next to nothing is no 0 in float32 either: its log has to be finite.
    share = (torch.where(tensor == 0, least, tensor) / total).clamp_min(torch.finfo(torch.float32).tiny)
    share[0] = 1
    return share


def _to_buffer(catalogue: Catalogue | None) -> Tensor:
    digest = b"" if catalogue is None else bytes.fromhex(catalogue.digest)
    return torch.tensor(list(digest), dtype=torch.uint8)


def _from_buffers(popularity: Tensor, digest: Tensor) -> Catalogue | None:
    if not digest.numel() or digest.is_meta:
        return None
    return Catalogue.known_by(popularity.numel() - 1, bytes(digest.tolist()).hex())
