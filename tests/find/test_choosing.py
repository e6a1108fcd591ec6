"""How many heads are taken: where the list of means breaks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.find.choosing import stand_out
from headwise.heads import SiteId
from headwise.scores import HeadScores, Provenance


def scored(means: Sequence[float]) -> HeadScores:
    """One layer, one item."""
    return HeadScores({"main": np.array([[list(means)]])}, {"main": (SiteId(layer=0),)}, ("item",), Provenance("m"))


def noise(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(-0.2, 0.2, n).tolist()


@pytest.mark.parametrize("planted", [[6.0], [6.0, 5.6], [6.0, 5.6, 3.0], [12.0, 3.0, 2.8]])
def test_a_planted_gap_is_found_wherever_the_heads_stand(planted: list[float]) -> None:
    means = [*noise(20), *planted, *noise(9, seed=1)]
    assert stand_out(scored(means)) == len(planted)


def test_a_strong_head_does_not_hide_a_weaker_one() -> None:
    assert stand_out(scored([12.0, 3.0, *noise(30)])) == 2


def test_heads_with_large_negative_scores_do_not_count() -> None:
    assert stand_out(scored([3.0, 2.9, *noise(30), -20.0, -18.0, -15.0])) == 2


def test_where_all_others_score_exactly_nothing_every_head_with_a_score_is_taken() -> None:
    assert stand_out(scored([0.9, 0.4, 0.35, *[0.0] * 29])) == 3


def test_no_gap_is_one_head() -> None:
    assert stand_out(scored(np.linspace(0, 1, 40).tolist())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_few_heads(seed: int) -> None:
    assert stand_out(scored(np.random.default_rng(seed).standard_normal(72).tolist())) <= 2


def test_all_alike_is_one_head() -> None:
    assert stand_out(scored([0.5] * 16)) == 1


def test_no_more_than_the_first_quarter() -> None:
    assert stand_out(scored([5.0] * 10 + [0.0] * 10)) <= 5


def test_where_most_heads_have_no_score_a_quarter_of_all_may_be_taken() -> None:
    """Copying: six of 32 heads copy, sixteen have no circuit at all, and the six are alike."""
    copying = [*[1.0] * 6, *noise(10), *[np.nan] * 16]
    assert stand_out(scored(copying)) == 6
    assert stand_out(scored(copying[:16])) == 1  # of sixteen heads six are no few
    assert stand_out(scored([*[1.0] * 10, *noise(10), *[np.nan] * 12])) == 1  # nor are ten of 32
    assert stand_out(scored([*[1.0] * 6, *noise(7), *[np.nan] * 19])) == 1  # seven heads are too few to tell from


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential"])
def test_heads_without_a_score_make_noise_stand_out_hardly_more_often(draw: str) -> None:
    rng = np.random.default_rng(0)
    further = 0
    for _ in range(300):
        means = getattr(rng, draw)(16)
        further += stand_out(scored([*means, *[np.nan] * 16])) > 4
    assert further <= 12  # 4 percent; every second time without the larger bound


def test_few_heads() -> None:
    assert stand_out(scored([3.0])) == 1
    assert stand_out(scored([3.0, 0.0])) == 1
    assert stand_out(scored([3.0, np.nan, 0.0])) == 1


def test_no_scores_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="no score of any head"):
        stand_out(scored([np.nan, np.nan]))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=60))
def test_the_scale_of_a_method_does_not_matter(means: list[float]) -> None:
    spaced = np.round(means, 1)  # so that rounding decides nothing
    k = stand_out(scored(spaced.tolist()))
    assert 1 <= k <= max(1, len(means) // 4)
    assert stand_out(scored((4.0 * spaced).tolist())) == k
