"""Statistics: closed forms, and error rates and power on controls that are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.errors import InputError
from headwise.verify.statistics import (
    above_chance_p,
    excess_interval,
    mean_interval,
    q_values,
    rank_p,
    studentised_floor,
    studentised_p,
)


def flat(means: list[float], items: int = 32) -> np.ndarray:
    """Control sets that cost the same on every item."""
    return np.repeat(np.array(means)[:, None], items, axis=1)


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("effect", "expected"), [(3.5, 1 / 5), (3.0, 2 / 5), (0.0, 5 / 5), (1.5, 3 / 5)])
def test_the_rank_p_counts_the_tested_set_and_ties(effect: float, expected: float) -> None:
    assert rank_p(effect, np.array([0.5, 1.0, 2.0, 3.0])) == pytest.approx(expected)


def test_the_studentised_p_by_hand() -> None:
    # Means 1 .. 21: median 11, MAD 5 (deviations 0, 1, 1, ... 10, 10), so the spread is 1.4826 * 5.
    controls = flat([float(k) for k in range(1, 22)])
    spread = stats.norm.ppf(0.75) ** -1 * 5 * math.sqrt(1 + math.pi / 2 / 21)
    expected = stats.t.sf((40 - 11) / spread, 3)
    assert studentised_p(np.full(32, 40.0), controls) == pytest.approx(expected, rel=1e-9)


def test_fewer_controls_have_fewer_degrees_of_freedom() -> None:
    controls = flat([float(k) for k in range(11)])  # median 5, MAD 3
    spread = 3 / stats.norm.ppf(0.75) * math.sqrt(1 + math.pi / 2 / 11)
    assert studentised_p(np.full(32, 50.0), controls) == pytest.approx(stats.t.sf(45 / spread, 2), rel=1e-9)


def test_an_effect_on_few_items_is_worth_less_and_by_welch() -> None:
    controls = flat([float(k) for k in range(1, 22)])
    drops = np.zeros(32)
    drops[:2] = 640.0  # mean 40, as above
    among_sets = (5 / stats.norm.ppf(0.75)) ** 2 * (1 + math.pi / 2 / 21)
    among_items = np.var(drops, ddof=1) / 32
    total = among_sets + among_items
    freedom = total**2 / (among_sets**2 / 3 + among_items**2 / 31)
    assert studentised_p(drops, controls) == pytest.approx(stats.t.sf(29 / math.sqrt(total), freedom), rel=1e-9)


@pytest.mark.parametrize("hard", [0.0, 100.0], ids=["items-alike", "some-items-hard-for-every-set"])
@pytest.mark.parametrize(("own", "beyond"), [(50.0, 50.0**2 - 30.0**2), (20.0, 0.0)], ids=["noisier", "quieter"])
def test_item_noise_enters_once(own: float, beyond: float, hard: float) -> None:
    """Item noise of 30 in every control set is in their spread already: only what the tested set has beyond it counts,
    and what an item does to all of them is none."""
    waver = np.tile([1.0, -1.0], 16)  # variance 32 / 31 over 32 items
    common = hard * np.tile([1.0, 1.0, -1.0, -1.0], 8)
    noise = np.array([30.0, -30.0] * 10 + [0.0])  # its mean over the sets is 0, the median of its squares 30^2
    controls = flat([float(k) for k in range(1, 22)]) + noise[:, None] * waver + common
    among_sets = (5 / stats.norm.ppf(0.75)) ** 2 * (1 + math.pi / 2 / 21)
    among_items = beyond / 31
    total = among_sets + among_items
    freedom = total**2 / (among_sets**2 / 3 + among_items**2 / 31)
    expected = stats.t.sf(29 / math.sqrt(total), freedom)
    assert studentised_p(40 + own * waver + common, controls) == pytest.approx(expected, rel=1e-9)


def test_what_the_items_do_to_every_set_alike_is_no_noise() -> None:
    """Paired: items that are hard for all sets change nothing."""
    rng = np.random.default_rng(0)
    controls, item = rng.normal(size=(50, 16)), 100 * rng.normal(size=16)
    drops = rng.normal(size=16) + 5
    assert studentised_p(drops + item, controls + item) == pytest.approx(studentised_p(drops, controls))
    assert excess_interval(drops + item, controls + item) == pytest.approx(excess_interval(drops, controls))


def test_control_sets_that_cost_more_bound_p_from_below() -> None:
    means = [0.0] * 10 + [0.1, 0.2, 0.3, 0.4, -0.1, -0.2, -0.3, -0.4, 0.05] + [50.0]
    assert studentised_p(np.full(32, 20.0), flat(means)) == pytest.approx(2 / 21)
    assert studentised_p(np.full(32, 60.0), flat(means)) < 1e-4


def test_controls_that_are_mostly_alike_fall_back_on_their_standard_deviation() -> None:
    means = [0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 5.0]
    spread = np.std(means, ddof=1) * math.sqrt(1 + math.pi / 2 / 20)
    assert studentised_p(np.full(32, 30.0), flat(means)) == pytest.approx(stats.t.sf(30 / spread, 3), rel=1e-9)


@pytest.mark.parametrize("items", [8, 16])
def test_without_any_spread_the_items_set_the_floor(items: int) -> None:
    assert studentised_p(np.ones(items), np.zeros((30, items))) == 2.0**-items
    assert studentised_p(np.zeros(items), np.zeros((30, items))) == 1.0


def test_the_floor_is_that_of_a_set_which_costs_everything() -> None:
    controls = flat([float(k) for k in range(1, 22)])
    assert studentised_floor(40.0, controls) == studentised_p(np.full(32, 40.0), controls)
    assert studentised_floor(40.0, controls) > studentised_floor(80.0, controls)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)])
def test_one_control_set_or_item_has_no_spread(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no spread"):
        studentised_p(np.ones(shape[1]), np.zeros(shape))
    assert all(math.isnan(end) for end in excess_interval(np.ones(shape[1]), np.zeros(shape)))


def test_q_is_that_of_benjamini_and_hochberg_and_a_missing_p_counts_as_one() -> None:
    assert q_values([0.01, 0.02, 0.5, 0.03]) == pytest.approx([0.04, 0.04, 0.5, 0.04])
    assert q_values([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)
    assert q_values([]).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_by_its_definition(p: list[float]) -> None:
    q, n = q_values(p), len(p)
    order = np.argsort(p)
    by_hand = [min(min(1.0, p[j] * n / (rank + 1)) for rank, j in list(enumerate(order))[place:]) for place in range(n)]
    assert q[order] == pytest.approx(by_hand)


def test_chance_is_tested_in_the_direction_of_the_metric() -> None:
    values = np.array([1.0, 2.0, 3.0, 2.0, 1.5, 2.5, 2.0, 1.0])
    assert above_chance_p(values, 0.0, 1) < 1e-3
    assert above_chance_p(values, 0.0, -1) > 0.99
    assert above_chance_p(np.ones(8), 0.0, 1) == 0.0
    assert above_chance_p(np.ones(8), 1.0, 1) == 1.0


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0])
    low, high = mean_interval(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))
    assert math.isnan(mean_interval(values[:1])[0])


# -- error rates and power, by simulation ------------------------------------------------------------------------------


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def student(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3, shape)


def contaminated(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One set in ten holds something that matters, and is ten times as far out."""
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.1, 10, 1)


Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def p_of_nulls(draw: Draw, sets: int, items: int, noise: float, n: int, own: Draw | None = None) -> np.ndarray:
    """p of `n` sets that are drawn as their controls are (or as `own` says), with noise of each item and set."""
    rng = np.random.default_rng([sets, items, n])
    found = np.empty(n)
    for i in range(n):
        means = draw(rng, (sets + 1,))
        if own is not None:
            means[0] = own(rng, (1,))[0]
        drops = means[:, None] + noise * rng.standard_normal((sets + 1, items)) + rng.standard_normal(items)
        found[i] = studentised_p(drops[0], drops[1:])
    return found


def most(rate: float, n: int) -> float:
    """Of `n` draws at this rate, a share that is exceeded once in ten thousand times."""
    return float(stats.binom.ppf(1 - 1e-4, n, rate)) / n


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 4.0], ids=["no-item-noise", "item-noise"])
@pytest.mark.parametrize(("sets", "items"), [(11, 16), (31, 16), (50, 64), (200, 32)])
@pytest.mark.parametrize("draw", [normal, student], ids=["normal", "student"])
def test_false_positives_are_as_rare_as_p_says(draw: Draw, sets: int, items: int, noise: float) -> None:
    n = 3000
    p = p_of_nulls(draw, sets, items, noise, n)
    assert (p <= 0.05).mean() <= most(0.05, n)
    assert (p <= 0.001).mean() <= most(0.0015, n)
    assert (p <= 0.05).mean() >= 0.005, "a test that never rejects would pass as well"


@pytest.mark.slow
@pytest.mark.parametrize("sets", [11, 50, 200])
def test_crucial_heads_among_the_controls_cost_no_validity(sets: int) -> None:
    n = 3000
    ordinary = p_of_nulls(contaminated, sets, 16, 1.0, n, own=normal)
    assert (ordinary <= 0.001).mean() <= most(0.001, n)
    alike = p_of_nulls(contaminated, sets, 16, 1.0, n)
    assert (alike <= 0.05).mean() <= most(max(0.05, 1 / (sets + 1)), n)
    assert (alike <= 0.001).mean() <= most(1 / (sets + 1), n)


@pytest.mark.parametrize("sets", [31, 100])
def test_the_degrees_of_freedom_of_the_mad_would_be_too_many_for_heavy_tails(sets: int) -> None:
    """Why `TAIL` is 3: the textbook rule rejects true hypotheses at 0.001 about ten times too often."""
    rng = np.random.default_rng(0)
    means = rng.standard_t(3, (20000, sets + 1))
    controls = means[:, 1:]
    centre = np.median(controls, axis=1)
    spread = stats.median_abs_deviation(controls, axis=1, scale="normal") * math.sqrt(1 + math.pi / 2 / sets)
    t = (means[:, 0] - centre) / spread
    assert (stats.t.sf(t, 0.37 * (sets - 1)) <= 0.001).mean() > 0.005
    assert (stats.t.sf(t, 3) <= 0.001).mean() < 0.0015


@pytest.mark.parametrize(("sets", "items", "least"), [(11, 32, 0.005), (31, 32, 5e-4), (100, 32, 5e-4)])
def test_power_for_effects_far_outside_the_controls(sets: int, items: int, least: float) -> None:
    """An effect of 25 spreads of the controls, as planted heads have it and more."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        controls = rng.standard_normal((sets, 1)) + rng.standard_normal((sets, items))
        found.append(studentised_p(25 + rng.standard_normal(items), controls))
    assert np.mean(np.array(found) <= least) >= 0.95


def test_the_interval_covers_the_excess() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        controls = rng.standard_normal((50, 1)) + 2 * rng.standard_normal((50, 16))
        low, high = excess_interval(3 + 2 * rng.standard_normal(16), controls)
        inside += low <= 3 <= high
    assert 0.92 <= inside / 400 <= 0.98
