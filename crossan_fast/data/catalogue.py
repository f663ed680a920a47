"""What rows mean: a catalogue is the item names of rows 1 … I, compared by digest.

Caches, splits, a model's popularity and runs number their items by one catalogue each. A catalogue only
grows: what was made for its first rows goes on meaning the same items, and the digest of those rows tells so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from crossan_fast._compiling import constant_in_graphs


class Catalogue:
    """The items of rows 1 … I. The same names with more behind them are the same catalogue grown.

    Attributes:
        num_items: I.
        names: of rows 1 … I; None where only their digest is known.
    """

    def __init__(self, num_items: int, digest: str | None, names: Sequence[str] | None = None) -> None:
        """Not for users: `of` and `known_by` say what they need."""
        self.num_items = num_items
        self.names = names
        self._digests: dict[int, str] = {} if digest is None else {num_items: digest}

    @classmethod
    def of(cls, names: Sequence[str]) -> Catalogue:
        """Of the names of rows 1 … I, which are read when a digest is first asked for."""
        return cls(len(names), None, names)

    @classmethod
    def known_by(cls, num_items: int, digest: str) -> Catalogue:
        """Of what was kept of another: its size and `digest`."""
        return cls(num_items, digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the names, in hexadecimal."""
        digest = self.digest_of(self.num_items)
        assert digest is not None
        return digest

    @constant_in_graphs
    def digest_of(self, num_items: int) -> str | None:
        """The digest of the first `num_items` rows alone, made once; None where the names are not known."""
        if num_items not in self._digests:
            if self.names is None or num_items > self.num_items:
                return None
            self._digests[num_items] = _digest(self.names[:num_items])
        return self._digests[num_items]

    def starts_with(self, other: Catalogue) -> bool:
        """Whether the rows of `other` are the first rows of this one: equal, or grown from it."""
        return self.digest_of(other.num_items) == other.digest

    def require(self, other: Catalogue, whose: str, hint: str = "") -> None:
        """Raise unless the rows of `other` are the first rows of this one, a cache's.

        Args:
            whose: what numbers its items by `other`, for the message.
            hint: what to do about it.

        Raises:
            ValueError: the sizes, and where names are known the first row that differs.
        """
        if self.starts_with(other):
            return
        sizes = f"its rows are of {other.num_items:,} items, the cache has {self.num_items:,}"
        raise ValueError(f"{whose}: {sizes}{self._first_difference(other)}{hint}")

    def _first_difference(self, other: Catalogue) -> str:
        if self.names is None or other.names is None:
            return " and other names in those rows" if other.num_items <= self.num_items else ""
        pairs = zip(self.names, other.names, strict=False)
        found = next(((row, *pair) for row, pair in enumerate(pairs, start=1) if pair[0] != pair[1]), None)
        if found is None:
            return ""
        row, here, there = found
        return f"; row {row} is {there!r} there and {here!r} in the cache"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Catalogue):
            return NotImplemented
        return self.num_items == other.num_items and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.num_items, self.digest))

    def __repr__(self) -> str:
        return f"Catalogue({self.num_items} items, {self.digest[:12]})"


def _digest(names: Sequence[str]) -> str:
    """Lengths first, so that no two lists of names run together to the same bytes."""
    sha = hashlib.sha256(np.fromiter(map(len, names), dtype="<u4", count=len(names)).tobytes())
    sha.update("".join(names).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()
