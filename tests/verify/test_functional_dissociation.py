"""The published dissociation score: its two-head case in closed form, and a planted model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes import ItemSet
from headwise.scores import HeadScores, Provenance
from headwise.verify.functional_dissociation import (
    dissociation_scores,
    functional_dissociation,
    random_heads,
    scale_free_dissociation_scores,
)
from headwise.zoo.planted import Planted, planted


def test_two_tasks_with_a_head_each_have_d_in_closed_form() -> None:
    """The card's case: head 0 feeds task A, head 1 task B; half of the heads out is chance on one of them."""
    base, chance = 0.9, 0.5
    performance = np.array([[chance, base], [base, chance]])
    expected = 100 * (base - chance) / base
    np.testing.assert_allclose(dissociation_scores(performance, np.array([base, base])), [expected, expected])
    np.testing.assert_allclose(
        scale_free_dissociation_scores(performance, np.array([base, base])), [expected, expected]
    )


def test_identical_heads_have_d_zero() -> None:
    base = np.array([0.9, 0.6])
    np.testing.assert_allclose(scale_free_dissociation_scores(np.array([base, base]) / 2, base), [0, 0])


def test_the_original_mixes_scales_and_the_other_does_not() -> None:
    base, performance = np.array([1.0, 0.5]), np.array([[0.2, 0.5], [1.0, 0.1]])
    np.testing.assert_allclose(dissociation_scores(performance, base), [30, 180])
    np.testing.assert_allclose(scale_free_dissociation_scores(performance, base), [80, 80])


def test_three_tasks_take_the_mean_of_the_others() -> None:
    performance = np.array([[0.1, 0.4, 0.6], [1, 1, 1], [1, 1, 1]])
    assert dissociation_scores(performance, np.ones(3))[0] == pytest.approx(40)


def test_behaviours_that_were_not_measured_are_left_out_of_the_mean() -> None:
    nan = float("nan")
    performance = np.array([[0.5, 0.8, nan], [0.9, 0.4, nan], [1.0, 0.6, 0.3]])
    np.testing.assert_allclose(dissociation_scores(performance, np.ones(3)), [30, 50, 50])
    alone = dissociation_scores(np.array([[0.5, nan], [0.9, 0.4]]), np.ones(2))
    np.testing.assert_allclose(alone, [nan, 50])


def test_d_of_a_single_task_or_of_an_unsolved_one_is_refused() -> None:
    with pytest.raises(InputError, match="two behaviours"):
        dissociation_scores(np.ones((1, 1)), np.ones(1))
    with pytest.raises(InputError, match="above 0"):
        dissociation_scores(np.ones((2, 2)), np.array([1.0, 0.0]))


def test_random_heads_leave_every_layer_one() -> None:
    heads = [Head.of(layer, index) for layer in range(3) for index in range(2)]
    for seed in range(20):
        drawn = random_heads(heads, 3, seed)
        assert sorted(head.layer for head in drawn.heads) == [0, 1, 2]
    assert random_heads(heads, 2, 0) == random_heads(heads, 2, 0)
    assert len({random_heads(heads, 2, seed) for seed in range(20)}) > 5


# -- planted models ---------------------------------------------------------------------------------------------------


@cache
def model() -> tuple[Planted, AttachedModel]:
    organism = planted("llama", circuits=("indirect-object", "memory"), seed=3)
    return organism, hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example)


@cache
def items(probe: str, seed: int = 0) -> ItemSet:
    return hw.encode(hw.probe(probe), model()[1].tokenizer, n=24, seed=seed)


def scores_of(labels: HeadSet, ids: Sequence[str]) -> HeadScores:
    """1 for the heads named, less for the others."""
    sites = tuple(site.id for site in model()[1].sites)
    values = np.array([[[float(Head(site, i) in labels) - 0.001 * i for i in range(8)] for site in sites]])
    return HeadScores({"main": np.repeat(values, len(ids), axis=0)}, {"main": sites}, tuple(ids), Provenance("truth"))


def test_functional_dissociation_of_a_planted_model_is_complete() -> None:
    """All heads of one behaviour out: its accuracy falls to 0 and the other's stays, so D is 100 in both forms."""
    organism, attached = model()
    given = {probe: items(probe) for probe in ("ioi", "facts")}
    ranked = {
        probe: scores_of(organism.truth.with_effect(probe, "total"), items(probe, 1).ids)  # type: ignore[arg-type]
        for probe in given
    }
    most = max(len(organism.truth.with_effect(probe, "total")) for probe in ("ioi", "facts"))  # type: ignore[arg-type]
    (found,) = functional_dissociation(attached, ranked, given, alphas=(most / 32,))
    assert found.n_heads == most
    np.testing.assert_allclose(found.base, [1, 1])
    np.testing.assert_allclose(np.diag(found.performance), [0, 0], atol=0.1)
    np.testing.assert_allclose(found.original, [100, 100], atol=15)
    np.testing.assert_allclose(found.scale_free, [100, 100], atol=15)
    assert found.random_performance.shape == (3, 2)
    assert np.abs(found.random_original.mean(axis=1)).max() < 1e-9  # one mask for both, the same base: nothing to gain


def test_functional_dissociation_refuses_what_it_cannot_compare() -> None:
    organism, attached = model()
    given = {probe: items(probe) for probe in ("ioi", "facts")}
    heads = organism.truth.with_effect("ioi", "total")
    ranked = {probe: scores_of(heads, ("elsewhere",)) for probe in given}
    with pytest.raises(InputError, match="same two or more behaviours"):
        functional_dissociation(attached, {"ioi": ranked["ioi"]}, {"ioi": given["ioi"]})
    with pytest.raises(InputError, match="ranked its heads cannot measure them"):
        functional_dissociation(attached, ranked | {"ioi": scores_of(heads, given["ioi"].ids)}, given)
    with pytest.raises(InputError, match="less is better"):
        functional_dissociation(attached, ranked, given, measured="cross-entropy")
    with pytest.raises(InputError, match=r"a share of 0\.95 is 30 of 32 heads"):
        functional_dissociation(attached, ranked, given, alphas=(0.95,))
    unsolved = hw.encode(hw.probe("arithmetic"), attached.tokenizer, n=8)
    with pytest.raises(Refusal, match="does not solve arithmetic at all"):
        functional_dissociation(
            attached, {"ioi": ranked["ioi"], "arithmetic": ranked["ioi"]}, {"ioi": given["ioi"], "arithmetic": unsolved}
        )
