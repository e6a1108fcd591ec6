"""Rows: shares, their intervals against closed forms, and what holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headwise.benches.looking.row import NONE, Row, Share, compared
from headwise.errors import InputError
from headwise.heads import HeadSet

GOOD = Row("r", ("L1H2",), 32, 0.1, 0.9, 0.8, (0.6, 1.0), 0.7, (0.4, 1.0), 8)


@pytest.mark.parametrize(
    ("changed", "changes", "holds"),
    [
        ({}, True, True),
        ({"interval": (-0.1, 1.0)}, False, False),
        ({"interval": (0.0, 1.0)}, False, False),
        ({"interval": NONE}, False, False),
        ({"beyond_interval": (-0.1, 1.0)}, True, False),
        ({"beyond_interval": NONE}, True, False),
        ({"wanted": -1}, False, False),
        ({"wanted": -1, "interval": (-1.0, -0.1), "beyond_interval": (-1.0, -0.1)}, True, True),
        ({"wanted": 0, "interval": (-0.04, 0.01), "beyond_interval": NONE}, True, True),
        ({"wanted": 0, "interval": (-0.06, 0.2)}, False, False),
        ({"wanted": 0, "interval": (0.0, 0.0), "without": 0.0}, False, False),
        ({"wanted": 0, "interval": NONE}, False, False),
        ({"refused": "no heads"}, False, False),
        ({"ruling": "not verified"}, True, False),
        ({"ruling": "verified", "interval": NONE}, False, True),
    ],
)
def test_what_holds(changed: dict[str, Any], changes: bool, holds: bool) -> None:
    row = replace(GOOD, **changed)
    assert (row.changes, row.holds) == (changes, holds)


def test_a_share_is_a_sum_over_a_sum() -> None:
    share = Share(np.array([1.0, 0.0, 2.0]), np.array([2.0, 2.0, 4.0]))
    assert share.value == 3 / 8
    assert share.drawn(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist() == [2 / 6, 2 / 4]
    assert Share.mean([1.0, math.nan, 0.0]).value == 0.5
    assert math.isnan(Share(np.array([1.0]), np.array([0.0])).value)


def test_a_change_is_paired_by_item() -> None:
    """Every item gains the same, so there is no doubt about the gain, whatever the items differ by."""
    without = np.random.default_rng(0).normal(size=50)
    change, interval, *_ = compared(Share.mean(without), Share.mean(without + 0.25))
    assert change == pytest.approx(0.25)
    assert interval == pytest.approx((0.25, 0.25))


def test_intervals_are_those_of_the_normal_distribution() -> None:
    draw = np.random.default_rng(1)
    gains, others = draw.normal(0.5, 1.0, 400), draw.normal(0.2, 1.0, (6, 400)) + np.arange(6)[:, None] / 5
    nothing = Share.mean(np.zeros(400))
    change, interval, beyond, beyond_interval = compared(
        nothing, Share.mean(gains), [Share.mean(each) for each in others], draws=4000
    )
    assert change == pytest.approx(gains.mean())
    half = 1.96 * gains.std() / 20
    assert interval == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.015)
    assert beyond == pytest.approx(gains.mean() - others.mean())
    # Over items the mean of the controls varies with the edit; over control sets as their means do.
    means = others.mean(axis=1)
    spread = math.hypot((gains - others.mean(axis=0)).std() / 20, means.std() / math.sqrt(6))
    half = 1.96 * spread
    assert beyond_interval[0] == pytest.approx(beyond - half, abs=0.04)
    assert beyond_interval[1] == pytest.approx(beyond + half, abs=0.04)
    assert beyond_interval[1] - beyond_interval[0] > interval[1] - interval[0]


def test_a_row_has_the_figures_of_its_shares() -> None:
    without, edited, control = (Share.mean(values) for values in ([0.0, 1, 0, 1], [1.0, 1, 1, 1], [0.0, 1, 1, 1]))
    row = Row.of("r", without, edited, [control], heads=HeadSet.parse("L1H2"), wanted=0, note="why")
    assert (row.name, row.heads, row.items, row.controls, row.wanted, row.note) == ("r", ("L1H2",), 4, 1, 0, "why")
    assert (row.without, row.edited, row.change, row.beyond) == (0.5, 1.0, 0.5, 0.25)
    assert math.isnan(Row.of("r", without, edited).beyond)


def test_shares_of_other_items_are_refused() -> None:
    with pytest.raises(InputError, match="the same items"):
        compared(Share.mean([1.0]), Share.mean([1.0, 0.0]))
    with pytest.raises(InputError, match="the same items"):
        compared(Share.mean([]), Share.mean([]))
