"""Memorisation rank: measured ranks, exact fits up to them, and the share of labels left over beyond."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.zoo.theory import MemorisationAttention, MemorisationTask, measured_rank


@pytest.mark.parametrize(
    ("task", "queries", "rank"),
    [
        (MemorisationTask(heads=3, context=5), 40, 13),
        (MemorisationTask(heads=5, context=4), 40, 16),
        (MemorisationTask(heads=3, context=5), 10, 10),
        (MemorisationTask(heads=3, context=5, head_size=2), 40, 13),
        (MemorisationTask(heads=2, context=1), 40, 1),
        (MemorisationTask(heads=8, context=16, d=24, head_size=24), 300, 121),
        (MemorisationTask(heads=3, context=10, d=6), 80, 18),
        (MemorisationTask(heads=3, context=7, d=6), 80, 18),
    ],
    ids=str,
)
def test_the_rank_is_that_of_the_formula(task: MemorisationTask, queries: int, rank: int) -> None:
    assert task.rank(queries) == rank
    for seed in range(3):
        assert measured_rank(MemorisationAttention(task, seed=seed), task.draw(queries, seed=seed)) == rank


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(3, 8), st.integers(1, 60), st.integers(0, 1000))
def test_the_rank_holds_for_any_sizes(heads: int, context: int, d: int, queries: int, seed: int) -> None:
    task = MemorisationTask(heads, context, d, head_size=d)
    assert measured_rank(MemorisationAttention(task, seed=seed), task.draw(queries, seed=seed)) == task.rank(queries)


def test_as_many_labels_fit_as_the_rank_says_and_not_one_more() -> None:
    task = MemorisationTask(heads=3, context=5)
    layer = MemorisationAttention(task)
    for queries in (task.rank(99), task.rank(99) + 1):
        items = task.draw(queries, seed=1)
        layer.fit(items)
        left = float((layer(items) - items.label).square().sum() / items.label.square().sum())
        assert (left < 1e-12) == (queries == 13)
    assert left > 1e-6


def test_the_share_left_over_is_that_of_the_formula() -> None:
    task = MemorisationTask(heads=3, context=5)
    layer = MemorisationAttention(task)
    left, total = 0.0, 0.0
    for seed in range(300):
        items = task.draw(40, seed=seed)
        layer.fit(items)
        left += float((layer(items) - items.label).square().sum())
        total += float(items.label.square().sum())
    assert task.unexplained(40) == pytest.approx(27 / 40)
    assert left / total == pytest.approx(27 / 40, rel=0.02)


def test_the_theorem_promises_no_more_than_the_rank() -> None:
    assert MemorisationTask(heads=3, context=5).guaranteed(40) == 13
    small = MemorisationTask(heads=3, context=5, head_size=2)
    assert small.guaranteed(40) == 4 < small.rank(40)
    assert small.guaranteed(3) == 3
    with pytest.raises(InputError, match="choose a larger d"):
        MemorisationTask(context=9, d=8).guaranteed(40)


def test_the_parts_of_a_layer_make_the_whole() -> None:
    task = MemorisationTask(heads=2, context=4, d=6, head_size=3)
    layer, items = MemorisationAttention(task, seed=2), task.draw(9, seed=2)
    layer.fit(items)
    pattern = layer.pattern(items)
    assert torch.allclose(pattern.sum(-1), torch.ones(9, 2, dtype=torch.float64))
    by_hand = layer.context @ layer.kq[1] @ items.query[4]
    assert torch.allclose(by_hand.softmax(0), pattern[4, 1])
    assert torch.allclose(layer.writes(items)[4, 1], pattern[4, 1] @ layer.context @ layer.ov[1])
    assert torch.allclose(layer.writes(items).sum(1), layer(items))
    assert torch.linalg.matrix_rank(layer.kq).tolist() == [3, 3]


def test_scores_have_unit_variance() -> None:
    task = MemorisationTask(heads=40, context=30, d=24, head_size=8)
    layer, items = MemorisationAttention(task), task.draw(100, seed=0)
    scores = torch.einsum("ne,hef,bf->bhn", layer.context, layer.kq, items.query)
    assert float(scores.std()) == pytest.approx(1, abs=0.1)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="choose at least one"):
        MemorisationTask(heads=0)
    with pytest.raises(InputError, match="at least one query"):
        MemorisationTask().unexplained(0)
