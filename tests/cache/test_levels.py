"""Level choice and pooling, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossan_fast.cache.levels import choose_levels, evenly, pool


def test_the_papers_choice_and_small_ones() -> None:
    assert evenly(7, 12) == (0, 2, 4, 6, 8, 10, 12)
    assert evenly(7, 6) == (0, 1, 2, 3, 4, 5, 6)
    assert evenly(1, 12) == (12,)
    assert evenly(2, 12) == (0, 12)
    assert evenly(1, 0) == (0,)


@given(st.integers(1, 60).flatmap(lambda layers: st.tuples(st.integers(2, layers + 1), st.just(layers))))
def test_evenly_is_the_nearest_spread_with_both_ends(sizes: tuple[int, int]) -> None:
    levels, layers = sizes
    chosen = evenly(levels, layers)
    assert len(chosen) == levels and chosen[0] == 0 and chosen[-1] == layers
    assert list(chosen) == sorted(set(chosen))
    for place, state in enumerate(chosen):
        assert abs(Fraction(place * layers, levels - 1) - state) <= Fraction(1, 2)


def test_choices_that_cannot_be() -> None:
    assert choose_levels([0, 3], 3) == (0, 3)
    for levels in (0, 5, -1):
        with pytest.raises(
            ValueError, match=rf"an encoder of 3 layers yields 4 states, expected 1 to 4 .* got {levels}"
        ):
            choose_levels(levels, 3)
    for listed in ([], [0, 4], [2, 1], [1, 1], [-1, 2]):
        with pytest.raises(ValueError, match=r"levels: expected rising state numbers in 0 to 3, got \["):
            choose_levels(listed, 3)


def test_pooling_ignores_padding_whatever_it_holds() -> None:
    tokens = torch.randn(3, 5, 4, dtype=torch.bfloat16)
    lengths = [5, 2, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    tokens[~mask] = float("nan")
    for row, length in enumerate(lengths):
        truth = tokens[row, :length].double().mean(0)
        torch.testing.assert_close(pool(tokens, mask, "mean")[row].double(), truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(pool(tokens, mask, "cls"), tokens[:, 0].float())
    whole = torch.randn(3, 5, 4)
    torch.testing.assert_close(
        pool(whole, None, "mean").double(), whole.double().mean(1), rtol=1e-6, atol=1e-6
    )
