"""Matching score and lag curve: closed forms, plain sums over patterns, and planted heads with their decoys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.errors import InputError
from headwise.find import find
from headwise.find.induction import LAGS, METHODS, lag_curve, matching_score
from headwise.model.attached import AttachedModel
from headwise.zoo.planted import Planted

WORDS = list(range(10, 17))
LIST = [1, *WORDS, *WORDS]  # bos, seven tokens, the same again


def look_back(head: int, t: int) -> dict[int, float]:
    """Head k looks k tokens back."""
    return {max(t - head, 0): 1.0}


def test_the_head_one_short_of_a_list_back_matches(tiny: AttachedModel, made: Any, scripted: Any, by_head: Any) -> None:
    """Seven back is the same token, so six back is the one after it."""
    with scripted(tiny, look_back):
        found = by_head(matching_score(tiny, made(LIST)))
    torch.testing.assert_close(found[0], (torch.arange(12) == 6).double(), atol=1e-5, rtol=0)


def test_the_lag_curve_is_one_where_the_head_looks(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    with scripted(tiny, look_back):
        curve = lag_curve(tiny, made(LIST, [1, *WORDS, 20, 21, *WORDS, 22]))
    assert curve.lags == tuple(range(-5, 6)) == LAGS
    mass = torch.cat([curve.mass[site] for site in sorted(curve.mass)], dim=1)
    for head in range(12):
        # The head looks `head` back and the same token is 7 (9) back.
        for row, period in enumerate((7, 9)):
            expected = torch.tensor([float(period + -lag == head) for lag in LAGS]).double()
            torch.testing.assert_close(mass[row, head], expected, atol=1e-5, rtol=0)


def test_graded_mass_is_a_graded_curve(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    """Half on what followed, a third on what came one later, the rest on the same token."""
    with scripted(tiny, lambda head, t: {t - 6: 1 / 2, t - 5: 1 / 3, t - 7: 1 / 6} if t >= 8 else {t: 1.0}):
        curve = lag_curve(tiny, made(LIST), lags=(0, 1, 2, 3))
    for mass in curve.mass.values():
        expected = torch.tensor([1 / 6, 1 / 2, 1 / 3, 0.0]).double().expand_as(mass)
        torch.testing.assert_close(mass, expected, atol=1e-5, rtol=0)


def test_the_latest_occurrence_counts_and_the_key_lies_before_the_query(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    """`a b a c a`: the third a looks at c, not b. `a a`: what follows the first a is the second itself."""
    items = made([10, 11, 10, 12, 10], [10, 10])
    with scripted(tiny, lambda head, t: {1: 1.0} if t == 2 else {3: 1.0} if t == 4 else {0: 1.0}):
        found = by_head(matching_score(tiny, items))
    assert (found[0] - 1).abs().max() < 1e-5
    assert found[1].isnan().all()


def test_special_tokens_are_on_no_lag(tiny: AttachedModel, made: Any, scripted: Any) -> None:
    """bos stands one before the first token, and takes everything."""
    with scripted(tiny, lambda head, t: {0: 1.0}):
        curve = lag_curve(tiny, made([1, 10, 11, 12, 10, 11, 12]), lags=(-1, 0))
    for mass in curve.mass.values():
        assert mass.abs().max() < 1e-5


def test_the_span_of_the_second_saying_says_which_queries_count(
    tiny: AttachedModel, made: Any, scripted: Any, by_head: Any
) -> None:
    with scripted(tiny, lambda head, t: {t - 6: 1.0} if t == 14 else {t: 1.0}):
        found = by_head(matching_score(tiny, made(LIST, LIST, repeated=[[13, 14], None])))
    torch.testing.assert_close(found[:, 0], torch.tensor([1 / 2, 1 / 7]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "minilm"])
@pytest.mark.parametrize("lag", [-1, 0, 1, 2])
def test_it_is_a_mean_over_the_pattern(
    request: pytest.FixtureRequest, made: Any, pattern: Any, by_head: Any, name: str, lag: int
) -> None:
    model = request.getfixturevalue(name)
    suffix, shift = ((102,), 1000) if name == "minilm" else ((), 0)
    rows = [[shift + each for each in row] for row in ([20, 21, 22, 23, 20, 21, 22], [30, 31, 32, 30, 31])]
    found = by_head(matching_score(model, made(*rows, suffix=suffix), lag=lag))
    for row, (ids, period) in enumerate(zip(rows, (4, 3), strict=True)):
        weights = pattern(model, [*ids, *suffix])
        pairs = [(t, t - period + lag) for t in range(period, len(ids)) if 0 <= t - period + lag < t]
        expected = torch.stack([weights[:, t, s] for t, s in pairs]).mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_the_planted_heads_and_their_decoy_come_first(organism: Planted, attached: AttachedModel) -> None:
    scores = find(METHODS[0], attached, items=4)
    wanted = organism.truth.heads("induction") | organism.truth.decoys("induction")
    ranked = scores.ranked()
    assert scores.top(len(wanted)) == wanted
    assert ranked[len(wanted) - 1].score > 0.99
    assert ranked[len(wanted)].score < 0.5


def test_lags_are_whole_numbers(tiny: AttachedModel, made: Any) -> None:
    with pytest.raises(InputError, match=r"lag=0\.5 must be a whole number"):
        lag_curve(tiny, made(LIST), lags=(0.5,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one lag"):
        lag_curve(tiny, made(LIST), lags=())
