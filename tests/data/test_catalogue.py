"""Catalogues: equal names are one, more names behind them are it grown, anything else is another."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossan_fast.data import Catalogue

# Short, so that names run together in many ways; with what UTF-8 has no bytes for.
NAMES = st.lists(st.text("ab\ud800é", min_size=1, max_size=3), unique=True, max_size=6)


@given(NAMES, NAMES)
def test_it_starts_with_another_where_the_lists_do(one: list[str], other: list[str]) -> None:
    a, b = Catalogue.of(one), Catalogue.of(other)
    assert a.starts_with(b) == (one[: len(other)] == other)
    assert (a == b) == (one == other)
    assert a.starts_with(Catalogue.known_by(b.num_items, b.digest)) == a.starts_with(b)


def test_names_that_run_together_differ() -> None:
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["a", "b", "c"]]
    digests = [Catalogue.of(names).digest for names in lists]
    assert len(set(digests)) == len(lists)
    assert all(one < other for one, other in pairwise(sorted(digests)))


def test_what_was_kept_of_one_does_not_know_its_parts() -> None:
    kept = Catalogue.known_by(3, Catalogue.of(["a", "b", "c"]).digest)
    assert kept.digest_of(2) is None
    assert not kept.starts_with(Catalogue.of(["a", "b"])), "it may, but cannot tell"
    assert kept == Catalogue.of(["a", "b", "c"])
    for made in (pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)):
        assert made == kept and hash(made) == hash(kept)


def test_a_difference_is_named() -> None:
    cache = Catalogue.of(["a", "b", "c"])
    cache.require(Catalogue.of(["a", "b"]), "split")
    with pytest.raises(ValueError, match=r"split: its rows are of 2 items, .* 3; row 2 is 'c' there and 'b'"):
        cache.require(Catalogue.of(["a", "c"]), "split")
    with pytest.raises(ValueError, match="run: its rows are of 4 items, the cache has 3; go home"):
        cache.require(Catalogue.of(["a", "b", "c", "d"]), "run", "; go home")
    with pytest.raises(
        ValueError, match=r"run: .* of 2 items, the cache has 3 and other names in those rows"
    ):
        cache.require(Catalogue.known_by(2, Catalogue.of(["a", "c"]).digest), "run")
