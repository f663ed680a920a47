"""What a model's forward gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class CrossanOutput(NamedTuple):
    """A tuple whose entries have names, `out.loss`, `out[0]` and `out["loss"]` alike.

    A tuple is what `torch.compile`, `torch.export`, data parallelism and transformers' `Trainer` pass through
    unasked.

    Attributes:
        loss: scalar: the configured loss plus `load_balance` times the router's.
        user_embeddings: `[B, S, d]`; the last place is the user's vector.
        item_embeddings: `[B, S + 1, d]`, by place of `item_ids`; what stands at padding has no meaning.
    """

    loss: Tensor
    user_embeddings: Tensor
    item_embeddings: Tensor

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key not in self._fields:
            raise KeyError(f"output: expected one of {list(self._fields)}, got {key!r}")
        return getattr(self, key)

    def keys(self) -> tuple[str, ...]:
        """The names, in order; with them `dict(out)` and `{**out}` work."""
        return self._fields

    def to_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """A plain tuple, by the name that transformers' outputs have for it."""
        return self.loss, self.user_embeddings, self.item_embeddings
