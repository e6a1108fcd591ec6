"""Associative capacity: a Hebbian memory against (N - 1) / (H d_k), softmax heads against their bound."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.errors import InputError
from headwise.zoo.theory import (
    AssociationItems,
    AssociationTask,
    HebbianHeads,
    SoftmaxHeads,
    hebbian_capacity,
    retrieval_error,
    softmax_error_bound,
)


@pytest.mark.parametrize(
    "task",
    [
        AssociationTask(pairs=4, key_size=16),
        AssociationTask(pairs=16, key_size=16),
        AssociationTask(pairs=64, key_size=16),
        AssociationTask(pairs=16, key_size=4),
        AssociationTask(pairs=16, key_size=16, heads=4),
        AssociationTask(pairs=12, key_size=1, value_size=40),
    ],
    ids=str,
)
def test_the_error_is_that_of_the_formula(task: AssociationTask) -> None:
    items = task.draw(3000, seed=0)
    assert retrieval_error(HebbianHeads()(items), items) == pytest.approx(task.error, rel=0.05)


def test_a_single_pair_is_held_without_error() -> None:
    task = AssociationTask(pairs=1, key_size=8)
    items = task.draw(10, seed=0)
    assert task.error == 0
    assert retrieval_error(HebbianHeads()(items), items) < 1e-12


def test_orthogonal_keys_hold_as_many_pairs_as_they_have_dimensions() -> None:
    values = AssociationTask(pairs=8, key_size=8).draw(1, seed=1).values
    items = AssociationItems(torch.linalg.qr(torch.randn(8, 8))[0][None, None], values)
    assert retrieval_error(HebbianHeads()(items), items) < 1e-10


def test_the_parts_of_the_heads_make_the_whole() -> None:
    items = AssociationTask(pairs=5, key_size=7, heads=3).draw(2, seed=2)
    heads = HebbianHeads()
    assert torch.allclose(items.keys.norm(dim=-1), torch.ones(2, 3, 5))
    assert torch.allclose(heads.writes(items).sum(1), heads(items))
    # The state form equals the form of attention, pattern times values.
    assert torch.allclose(heads.writes(items) * 3, heads.pattern(items) @ items.values[:, None], atol=1e-5)


def test_capacity_turns_the_error_round() -> None:
    for error in (0.0, 0.1, 0.5, 15 / 16, 7 / 3):
        pairs = hebbian_capacity(error, key_size=16, heads=3)
        assert AssociationTask(pairs, 16, heads=3).error <= error + 1e-9
        assert AssociationTask(pairs + 1, 16, heads=3).error > error
    assert hebbian_capacity(15 / 16, key_size=16) == 16


def test_softmax_heads_stay_below_their_bound_far_beyond_the_hebbian_capacity() -> None:
    task = AssociationTask(pairs=64, key_size=16)
    items = task.draw(300, seed=3)
    overlaps = HebbianHeads().pattern(items) - 2 * torch.eye(64)
    overlap = float(overlaps.max())
    for beta in (10.0, 30.0, 100.0):
        error = retrieval_error(SoftmaxHeads(beta)(items), items)
        assert error < softmax_error_bound(64, beta=beta, overlap=overlap)
    assert error < 0.02 < task.error / 100


def test_the_softmax_bound_is_reached_by_one_pair_at_the_overlap() -> None:
    """Two keys at the overlap: the other one has all of the attention that the right one lacks."""
    overlap, beta = 0.3, 2.0
    keys = torch.tensor([[1.0, 0.0], [overlap, math.sqrt(1 - overlap**2)]])
    values = torch.randn(200_000, 2, 1, generator=torch.Generator().manual_seed(4))
    items = AssociationItems(keys.expand(200_000, 1, 2, 2), values)
    bound = softmax_error_bound(2, beta=beta, overlap=overlap)
    assert retrieval_error(SoftmaxHeads(beta)(items), items) == pytest.approx(bound, rel=0.02)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="choose at least one"):
        AssociationTask(pairs=0, key_size=4)
    with pytest.raises(InputError, match="choose error >= 0"):
        hebbian_capacity(-1.0, key_size=4)
    with pytest.raises(InputError, match="an overlap between"):
        softmax_error_bound(4, beta=1.0, overlap=1.5)
