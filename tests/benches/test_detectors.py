"""`headwise bench detectors`: the figures in closed form, what has to be found, and a small run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headwise import catalogue
from headwise.benches import detectors
from headwise.benches.detectors import CASES, Hit, attending, compared, copying_the_needle, measure, writing
from headwise.errors import InputError
from headwise.find import METHODS
from headwise.find.pages import sees
from headwise.heads import HeadSet, SiteId
from headwise.scores import HeadScores, Provenance
from headwise.zoo.planted import planted


def scores(*means: float) -> HeadScores:
    """Of the heads of L0."""
    return HeadScores({"main": np.array([[means]])}, {"main": (SiteId(layer=0),)}, ("a",), Provenance("m"))


def test_figures_in_closed_form() -> None:
    # In order: wanted, other, wanted, other, other.
    found = compared(scores(9, 8, 5, 1, -1), HeadSet.parse("L0H0, L0H2"), k=3)
    assert found == Hit(k=3, recall=1.0, precision=pytest.approx(2 / 3), auc=pytest.approx(5 / 6), margin=-0.3)


def test_heads_that_are_apart_have_a_margin() -> None:
    found = compared(scores(0, 6, 10, 1), HeadSet.parse("L0H1, L0H2"), k=1)
    assert found == Hit(k=1, recall=0.5, precision=1.0, auc=1.0, margin=pytest.approx(0.5))


def test_ties_are_half_right() -> None:
    assert compared(scores(1, 1, 1), HeadSet.parse("L0H0"), k=1).auc == pytest.approx(0.5)


def test_a_head_without_a_score_is_not_found() -> None:
    assert compared(scores(3, 1, math.nan), HeadSet.parse("L0H0, L0H2"), k=1).recall == pytest.approx(0.5)


def test_there_must_be_something_to_find_and_something_to_leave() -> None:
    for heads in ("L0H2", "L0H0, L0H1"):
        with pytest.raises(InputError, match="heads are to be found"):
            compared(scores(1, 2), HeadSet.parse(heads), k=1)


def test_methods_of_patterns_are_to_find_decoys_and_others_are_not() -> None:
    truth = planted(circuits=("induction", "key"), seed=1).truth
    assert set(attending("induction")(truth)) == {*truth.heads("induction"), *truth.decoys("induction")}
    assert not writing("induction")(truth) & truth.decoys("induction")
    assert attending("previous-token")(truth) == truth.heads("previous-token")
    assert not copying_the_needle(truth) & truth.heads("backup")


def test_every_method_that_looks_for_heads_has_a_case() -> None:
    described = {"local-global", "fact-parts", "correct-letter", "codes", "head-pursuit"}
    seeing = {method.id for method in METHODS if sees(method)}  # no planted model has eyes
    assert {case.method for case in CASES} == {method.id for method in METHODS} - described - seeing


@pytest.mark.slow
def test_a_small_run_finds_the_heads() -> None:
    cases = tuple(case for case in CASES if case.method in ("previous-token", "direct-logit"))
    said: list[str] = []
    found = measure(seed=3, seeds=1, cases=cases, said=said.append)
    assert len(said) == found["models"] == 3
    for case in cases:
        for quantity in ("recall", "precision", "auc", "separated"):
            assert found[f"{case.method}.{quantity}"] == 1.0
        assert found[f"{case.method}.margin"] > 0.1
    assert all(math.isfinite(value) for value in found.values())


def test_models_differ_in_places_and_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        detectors, "planted", lambda kind, seed, strength: built.append((kind, seed, *sorted(strength.items())))
    )
    list(detectors._models(5, 2))
    assert [each[:2] for each in built] == [(kind, seed) for seed in (5, 6) for kind in ("llama", "llama-gqa", "gpt2")]
    strengths = [value for each in built for _, value in each[2:]]  # type: ignore[misc]
    assert len(set(strengths)) == len(strengths)
    assert 0.6 * 0.7 <= min(strengths) < max(strengths) <= 1.4


def test_it_is_a_bench() -> None:
    entry = catalogue.entry("benches", "detectors")
    assert isinstance(entry, catalogue.BenchEntry)
    assert entry.options == ("seed",)


SHORT = {
    "arithmetic",
    "chain-of-thought-copy",
    "copying",
    "profile",
    "retrieval",
    "retrieval-proxy",
    "uniform",
}
"""Methods of whose heads the tool names more than are there; `docs/benchmarks.md` says how far they are below 0.95."""


@pytest.mark.prove
def test_detectors_find_what_is_planted() -> None:
    found = measure()
    assert found["models"] == 30
    for case in CASES:
        assert found[f"{case.method}.auc"] >= 0.95, case.method
    assert {case.method for case in CASES if found[f"{case.method}.precision"] < 0.95} == SHORT
