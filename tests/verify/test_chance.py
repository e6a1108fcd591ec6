"""Chance levels: given, by construction, and measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import headwise as hw
from headwise.errors import Refusal
from headwise.metrics import METRICS, measure, metric
from headwise.probes import ItemSet, encode, probe
from headwise.verify.chance import chance_of, with_answers_of_others
from headwise.zoo.planted import planted


@cache
def model() -> hw.AttachedModel:
    organism = planted(layers=2, heads=4, circuits=("induction",), seed=0)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example)


@cache
def items(name: str = "repeat", n: int = 12) -> ItemSet:
    return encode(probe(name), model().tokenizer, n=n)


def test_the_probe_says_it_for_its_own_metric_only() -> None:
    assert chance_of(model(), items(), metric("logit-difference")) == 0.0
    assert chance_of(model(), items(), metric("answer-log-probability")) < -3
    # Items of the user's own that happen to be called like a probe.
    own = replace(items(), metric="answer-log-probability")
    assert chance_of(model(), own, metric("answer-log-probability")) < -3


@pytest.mark.parametrize("id", ["logit-difference", "probability-difference", "cosine-to-clean", "refusal"])
def test_some_are_nought_by_construction(id: str) -> None:
    assert chance_of(model(), replace(items(), probe="own"), metric(id)) == 0.0


def test_a_drift_is_no_behaviour() -> None:
    with pytest.raises(Refusal, match="how far a model drifts"):
        chance_of(model(), items(), metric("kl-to-clean"))


def test_every_other_metric_is_measured() -> None:
    measured = {"answer-log-probability", "answer-rank", "exact-match", "exact-match-generated", "cross-entropy"}
    rest = {each.id for each in METRICS} - measured
    assert rest == {
        "logit-difference", "probability-difference", "cosine-to-clean", "refusal", "kl-to-clean", "rouge-1-recall",
    }  # fmt: skip
    swapped = with_answers_of_others(items())
    for id in sorted(measured):
        expected = float(measure(model(), swapped, id).double().mean())
        assert chance_of(model(), items(), metric(id)) == pytest.approx(expected)


def test_the_model_knows_the_answers_and_not_those_of_others() -> None:
    assert chance_of(model(), items(), metric("exact-match")) == 0.0
    clean = float(measure(model(), items(), "answer-log-probability").mean())
    assert clean - chance_of(model(), items(), metric("answer-log-probability")) > 5


def test_every_item_gets_the_answer_of_another_one() -> None:
    swapped = with_answers_of_others(items(), seed=3)
    assert swapped.ids == items().ids
    answers = {each.answer for each in items()}
    for own, other in zip(items(), swapped, strict=True):
        assert other.prompt == own.prompt
        assert other.answer in answers
        assert other.answer not in (own.answer, *own.also)
        assert (other.foils, other.also, other.twin) == ((), (), None)
    assert with_answers_of_others(items(), seed=3) == swapped
    assert with_answers_of_others(items(), seed=4) != swapped


def test_answers_that_are_all_the_same_cannot_be_swapped() -> None:
    first = items().items[0]
    alike = replace(items(), items=tuple(replace(each, answer=first.answer, also=()) for each in items()))
    with pytest.raises(Refusal, match="same answer"):
        with_answers_of_others(alike)
    with pytest.raises(Refusal, match="same answer"):
        with_answers_of_others(replace(items(), items=(first,)))
