"""Control sets: what they must have in common with the tested set, and what they must not."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.heads import Head, HeadSet
from headwise.sweep import matched_sets
from headwise.sweep.matched import FEWEST


def every(layers: int, heads: int, stack: str = "main") -> HeadSet:
    return HeadSet(tuple(Head.of(layer, index, stack) for layer in range(layers) for index in range(heads)))


def histogram(heads: HeadSet) -> Counter[int]:
    return Counter(each.layer for each in heads.heads)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matched_sets_have_the_same_layers_and_no_tested_head(data: st.DataObject) -> None:
    available = every(4, 12)
    chosen = data.draw(st.sets(st.sampled_from(available.heads), min_size=1, max_size=6))
    tested, n = HeadSet(tuple(chosen)), data.draw(st.integers(1, 60))
    controls = matched_sets(tested, available, n, seed=data.draw(st.integers(0, 5)))
    assert len(set(controls.sets)) == len(controls.sets) <= n
    assert all(len(each) == len(tested) and not each & tested for each in controls.sets)
    assert all(each <= available for each in controls.sets)
    if controls.match == "layers":
        assert all(histogram(each) == histogram(tested) for each in controls.sets)
    assert len(controls.sets) == n or controls.exhausted


def test_all_sets_are_taken_where_they_are_few() -> None:
    tested = HeadSet.parse("L0H0, L0H1, L1H0")
    controls = matched_sets(tested, every(2, 6), 100, seed=0)
    expected = {HeadSet.parse([(0, a), (0, b), (1, c)]) for a, b in combinations(range(2, 6), 2) for c in range(1, 6)}
    assert len(expected) == comb(4, 2) * 5
    assert set(controls.sets) == expected
    assert (controls.match, controls.exhausted) == ("layers", True)


def test_the_match_is_widened_to_neighbours_where_fewer_than_twenty_are_left() -> None:
    """One head of four: three others in the layer, eleven with the layers beside it; the stack has enough."""
    tested = HeadSet.parse("L3H0")
    controls = matched_sets(tested, every(12, 8), 100, seed=0)  # 7 in the layer, 23 with the neighbours
    assert (controls.match, len(controls.sets), controls.exhausted) == ("neighbouring layers", 23, True)
    assert {each.heads[0].layer for each in controls.sets} == {2, 3, 4}
    wider = matched_sets(tested, every(12, 4), 100, seed=0)  # 3, then 11, then 47
    assert (wider.match, len(wider.sets), wider.exhausted) == ("model", 47, True)


def test_the_match_is_not_widened_where_as_many_as_were_asked_for_are_there() -> None:
    controls = matched_sets(HeadSet.parse("L3H0"), every(12, 8), 5, seed=0)
    assert (controls.match, len(controls.sets)) == ("layers", 5)
    assert FEWEST == 20


def test_controls_stay_in_the_stack() -> None:
    available = every(4, 3) | every(4, 3, "encoder")
    controls = matched_sets(HeadSet.parse("encoder.L0H0"), available, 50, seed=0)
    assert controls.match == "model"
    assert {each.stacks for each in controls.sets} == {("encoder",)}


def test_nothing_is_left_to_compare_with() -> None:
    controls = matched_sets(every(1, 4), every(1, 4), 10, seed=0)
    assert (controls.sets, controls.exhausted) == ((), True)


def test_the_same_for_the_same_seed_and_other_ones_for_another() -> None:
    tested, available = HeadSet.parse("L0H0, L1H5, L2H2"), every(4, 12)
    one, again, other = (matched_sets(tested, available, 40, seed=seed).sets for seed in (0, 0, 1))
    assert one == again
    assert set(one) != set(other)


def test_draws_are_spread_over_the_heads() -> None:
    """No head is preferred: each of 20 stands in about a tenth of the sets of two."""
    tested = HeadSet.parse("L0H20, L0H21")
    controls = matched_sets(tested, every(1, 22), 100, seed=0)
    counts = Counter(head for each in controls.sets for head in each.heads)
    assert len(counts) == 20
    assert max(counts.values()) <= 22
    assert min(counts.values()) >= 2


@pytest.mark.parametrize(("heads", "n"), [(HeadSet(), 10), (HeadSet.parse("L0H0"), 0)])
def test_without_heads_or_a_number_there_is_nothing_to_match(heads: HeadSet, n: int) -> None:
    with pytest.raises(InputError, match="number of sets"):
        matched_sets(heads, every(2, 4), n, seed=0)
