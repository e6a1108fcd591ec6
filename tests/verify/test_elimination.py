"""Bounds from part of a table, and the k largest rows: known answers, and the error over many orders."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.verify import elimination
from headwise.verify.elimination import ADVANCE, BETS, Standing, top_k, upper_bounds

# -- bounds ----------------------------------------------------------------------------------------------------------


def test_a_bet_on_the_true_mean_gains_nothing_on_average() -> None:
    population = np.array([-1.0, 0.2, 0.5, 0.9, -0.3])
    orders = np.array(list(permutations(population)))
    grown = np.exp(elimination._log_wealth(orders, 5, 1.0, np.full(len(orders), population.mean())))
    # The last item is known when the others are, so nothing can be won or lost on it.
    assert grown.mean(axis=0) == pytest.approx(np.ones(5), rel=1e-9)
    assert grown[:, 1].std() > 0.1


def test_the_bound_of_a_quiet_head_is_where_the_stake_has_grown_by_one_over_alpha() -> None:
    n_items, drawn, largest, alpha = 40, 6, 2.0, 0.01
    (bound,) = upper_bounds(np.zeros((1, drawn)), n_items, largest, alpha)
    grown = 0.0
    for bet, share in BETS:
        pot = share
        for i in range(drawn):
            expected = n_items * bound / (n_items - i)
            pot *= 1 + bet * expected / (largest - expected)
        grown += pot
    assert grown == pytest.approx(1 / alpha, rel=1e-5)


def test_with_all_items_drawn_the_bound_is_the_mean() -> None:
    effects = np.array([[0.5, -1.0, 0.25], [1.0, 1.0, 1.0]])
    assert upper_bounds(effects, 3, 1.0, 0.01) == pytest.approx(effects.mean(axis=1), abs=1e-12)


def test_what_is_left_can_be_no_more_than_the_largest() -> None:
    # Nine of ten items cost nothing: whatever the last one does, the mean is at most a tenth of the largest.
    (bound,) = upper_bounds(np.zeros((1, 9)), 10, 5.0, 1e-9)
    assert bound == pytest.approx(0.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.001, 0.1))
def test_bounds_fall_as_items_are_drawn_and_stay_above_what_is_possible(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.uniform(-1, 1, (3, 12))
    bounds = np.array([upper_bounds(effects[:, :n], 12, 1.0, alpha) for n in range(1, 13)])
    # An order in which a bound was wrong is one in which the last item has to put it right, upwards.
    right = (bounds >= effects.mean(axis=1) - 1e-9).all(axis=0)
    assert (np.diff(bounds, axis=0)[:, right] <= 1e-6).all()
    least = np.array([(effects[:, :n].sum(axis=1) - (12 - n)) / 12 for n in range(1, 13)])
    assert (bounds >= least - 1e-9).all()


@pytest.mark.parametrize("share", [0.06, 0.3, 0.9])
def test_a_bound_is_below_the_mean_in_fewer_orders_than_alpha_says(share: float) -> None:
    """Effects that are all or nothing, the worst there are; over all numbers of items at once."""
    n_items, orders, alpha = 50, 300, 0.2
    population = (np.arange(n_items) < share * n_items) * 1.0
    rng = np.random.default_rng(1)
    effects = np.array([rng.permutation(population) for _ in range(orders)])
    ever = np.zeros(orders, dtype=bool)
    for n in range(1, n_items):
        ever |= upper_bounds(effects[:, :n], n_items, 1.0, alpha) < population.mean() - 1e-9
    assert ever.mean() <= alpha
    assert ever.mean() >= alpha / 10  # not for want of betting


# -- the k largest ---------------------------------------------------------------------------------------------------


class Covered:
    """A table that counts what is uncovered."""

    def __init__(self, effects: np.ndarray) -> None:
        self.effects, self.times, self.calls = effects, np.zeros(effects.shape, dtype=int), 0

    def __call__(self, heads: np.ndarray, items: np.ndarray) -> np.ndarray:
        self.times[np.ix_(heads, items)] += 1
        self.calls += 1
        found: np.ndarray = self.effects[np.ix_(heads, items)]
        return found


def raced(effects: np.ndarray | Covered, k: int = 2, **changed: object) -> Standing:
    covered = effects if isinstance(effects, Covered) else Covered(effects)
    n_heads, n_items = covered.effects.shape
    settings = {"screen": np.zeros(n_heads), "error": 0.05, "epsilon": 0.1, "largest": 2.0, "seed": 0, **changed}
    return top_k(covered, n_items, k=k, **settings)  # type: ignore[arg-type]


def table(means: dict[int, float], n_heads: int = 60, n_items: int = 64, seed: int = 0) -> np.ndarray:
    effects = 0.02 * np.random.default_rng(seed).standard_normal((n_heads, n_items))
    for head, mean in means.items():
        effects[head] += mean
    return effects


def test_the_heads_that_matter_are_named_after_few_items_of_the_others() -> None:
    covered = Covered(table({7: 1.0, 31: 0.8}))
    ended = raced(covered)
    assert np.flatnonzero(ended.named).tolist() == [7, 31]
    assert np.median(ended.spent) <= 8
    assert covered.times.max() == 1
    assert covered.times.sum() == ended.spent.sum()
    assert covered.calls <= 6  # many heads in one call


def test_what_is_reported_is_what_was_uncovered() -> None:
    effects = table({7: 1.0, 31: 0.8})
    covered = Covered(effects)
    ended = raced(covered)
    seen = np.where(covered.times > 0, effects, 0).sum(axis=1) / covered.times.sum(axis=1)
    assert ended.estimate == pytest.approx(seen)
    assert (ended.lower <= seen + 1e-9).all()
    assert (ended.upper >= seen - 1e-9).all()
    assert ended.floor == pytest.approx(ended.lower[ended.named].min())
    assert (ended.upper[~ended.named] <= ended.floor + 0.1).all()


def test_a_wrong_screen_costs_little_and_changes_nothing() -> None:
    effects = table({7: 1.0, 31: 0.8})
    right, wrong = np.zeros(60), np.zeros(60)
    right[[7, 31]], wrong[[7, 31]] = 1, -1
    good, bad = raced(effects, screen=right), raced(effects, screen=wrong)
    assert good.named.tolist() == bad.named.tolist()
    assert good.spent.sum() <= bad.spent.sum() <= good.spent.sum() + 2 * len(right)


def test_a_head_that_matters_on_few_items_is_not_left_out_for_them() -> None:
    """Five items of 64 carry the whole effect; the first items uncovered mostly show none of it."""
    effects = table({})
    effects[7, :12] = effects[31, 20:32] = 2.0
    for seed in range(20):
        assert np.flatnonzero(raced(effects, seed=seed).named).tolist() == [7, 31]


def test_where_heads_do_not_differ_every_item_is_uncovered_before_one_is_named_over_another() -> None:
    ended = raced(table({}), epsilon=0.0)
    means = table({}).mean(axis=1)
    assert means[ended.named].min() >= means[~ended.named].max()
    assert ended.spent.min() > 32


def test_near_ties_end_when_they_are_within_epsilon() -> None:
    effects = table({7: 1.0, 31: 0.80, 32: 0.79})
    assert raced(effects, epsilon=0.3).spent[[31, 32]].min() < raced(effects, epsilon=0.0).spent[[31, 32]].min() == 64


def test_an_effect_beyond_the_largest_counts_as_the_largest() -> None:
    effects = table({7: 1.0, 31: 0.8})
    effects[3, :] = 0.0
    effects[3, 5] = 1e9
    effects[4, 6] = -1e9
    for seed in range(10):
        ended = raced(effects, seed=seed)
        assert np.flatnonzero(ended.named).tolist() == [7, 31]
        assert ended.beyond[[3, 4]].max() <= 1
        assert ended.beyond[7] == 0
        assert np.abs(ended.estimate).max() <= 2
    assert sum(raced(effects, seed=seed).beyond.sum() for seed in range(10)) > 0


def test_the_bounds_share_out_the_error_and_no_more() -> None:
    lanes = elimination._Lanes(Covered(table({})), 64, np.zeros(60), 5, 0.05, 2.0, 0)
    assert 5 * lanes.alpha_upper + 55 * lanes.alpha_lower == pytest.approx(0.05)


def test_leaders_get_ahead_by_what_others_spend_and_no_more() -> None:
    covered = Covered(table({7: 1.0, 31: 0.8}, n_items=4000))
    ended = raced(covered)
    ahead, others = ended.spent[ended.named].sum(), ended.spent[~ended.named].sum()
    assert ahead <= others + ADVANCE * 60
    assert np.flatnonzero(ended.named).tolist() == [7, 31]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 9), st.sampled_from([0.0, 0.3]))
def test_every_race_ends_whatever_is_tied(seed: int, n_heads: int, n_items: int, epsilon: float) -> None:
    rng = np.random.default_rng(seed)
    covered = Covered(rng.choice([-0.7, 0.0, 0.1, 1.0], (n_heads, n_items)))
    k = int(rng.integers(1, n_heads))
    ended = raced(covered, k, epsilon=epsilon, screen=rng.integers(0, 2, n_heads) * 1.0, seed=seed)
    assert ended.named.sum() == k
    assert covered.times.max() == 1
    assert (ended.spent >= 1).sum() >= k


@pytest.mark.parametrize("k", [1, 4])
def test_the_promise_fails_in_fewer_races_than_the_error_says(k: int) -> None:
    """All-or-nothing effects with means close together, so that an order can mislead; a large error, to see some."""
    error, epsilon = 0.4, 0.02
    failures = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        chances = np.concatenate([np.full(k, 0.5), np.full(12, 0.3), np.full(15, 0.05)])
        effects = (rng.random((len(chances), 80)) < chances[:, None]) * 1.0
        ended = raced(effects, k, error=error, epsilon=epsilon, largest=1.0, seed=seed)
        assert ended.upper[~ended.named].max() <= ended.floor + epsilon
        means = effects.mean(axis=1)
        rank_k = np.sort(means)[-k]
        wrong = (
            means[ended.named].min() < rank_k - epsilon - 1e-9 or means[~ended.named].max() > rank_k + epsilon + 1e-9
        )
        failures += wrong
    assert failures / 80 <= error
