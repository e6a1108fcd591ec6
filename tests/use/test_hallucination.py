"""POPE's and CHAIR's numbers on hand-made answers, and what a model's own answers become."""

from __future__ import annotations

import math

import pytest
import torch

import headwise as hw
from headwise import use
from headwise.probes.item import Item
from headwise.use.hallucination import Answers, Hallucination, Listings, _named, answers, hallucination, listings


@pytest.fixture(scope="module")
def model():
    with hw.load("zoo:tiny-llava") as model:
        yield model


def test_numbers_of_yes_and_no() -> None:
    #           hit   hit   miss  false  right no
    there = torch.tensor([True, True, True, False, False])
    yes = torch.tensor([True, True, False, True, False])
    found = Answers(there, yes)
    assert found.right.tolist() == [1, 1, 0, 0, 1]
    assert found.accuracy == pytest.approx(0.6)
    assert found.yes_rate == pytest.approx(0.6)
    assert found.false_yes_rate == pytest.approx(0.5)
    assert found.recall == pytest.approx(2 / 3)
    assert found.precision == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)


def test_shares_of_nothing_are_nan() -> None:
    found = Answers(torch.tensor([True, True]), torch.tensor([False, False]))
    assert math.isnan(found.false_yes_rate)
    assert math.isnan(found.precision)
    assert found.f1 == 0
    nothing = Listings(("",), (frozenset({"star"}),), (frozenset(),))
    assert math.isnan(nothing.chair_i)
    assert nothing.chair_s == nothing.recall == 0


def test_numbers_of_listings() -> None:
    found = Listings(
        ("star, ring", "cross", "heart, star, ring"),
        (frozenset({"star"}), frozenset({"cross", "ring"}), frozenset({"heart"})),
        (frozenset({"star", "ring"}), frozenset({"cross"}), frozenset({"heart", "star", "ring"})),
    )
    assert found.absent.tolist() == [1, 0, 2]
    assert found.with_absent.tolist() == [1, 0, 1]
    assert found.found.tolist() == [1, 0.5, 1]
    assert found.chair_i == pytest.approx(3 / 6)
    assert found.chair_s == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(3 / 4)
    both = Hallucination(Answers(torch.tensor([True]), torch.tensor([True])), found)
    assert both.figures == {
        "accuracy": 1.0,
        "yes_rate": 1.0,
        "false_yes_rate": pytest.approx(math.nan, nan_ok=True),
        "f1": 1.0,
        "chair_i": found.chair_i,
        "chair_s": found.chair_s,
        "recall": found.recall,
    }


def test_yes_is_said_where_it_is_the_more_likely_word(model) -> None:
    items = hw.encode(hw.probe("existence"), model, n=12)
    found = answers(model, items, batch_size=5)
    yes_first = hw.measure(model, items, "logit-difference")
    there = [each.item.answer == " yes" for each in items]
    assert found.there.tolist() == there
    assert found.yes.tolist() == [(value > 0) == each for value, each in zip(yes_first.tolist(), there, strict=True)]
    assert found.right.tolist() == (yes_first > 0).float().tolist()


def test_listings_are_what_the_model_writes(model) -> None:
    items = hw.encode(hw.probe("listing"), model, n=4)
    found = listings(model, items, new_tokens=6)
    assert found.there == tuple(frozenset(each.item.answer.strip(" .").split(", ")) for each in items)
    alone = listings(model, hw.encode([each.item for each in items], model), new_tokens=6, batch_size=1)
    assert found.texts == alone.texts


def test_plurals_in_es() -> None:
    assert _named("two crosses and a starfish", ("cross", "star")) == {"cross"}


def test_words_are_found_whole_with_an_s_and_in_any_case() -> None:
    assert _named("Two Stars, a ringlet and a cross.", ("star", "ring", "cross")) == {"star", "cross"}


def test_an_intervention_is_carried_out(model) -> None:
    questions = hw.encode(hw.probe("existence"), model, n=6)
    lists = hw.encode(hw.probe("listing"), model, n=2)
    every = use.HeadRemoval(model.heads())
    under = hallucination(model, questions, lists, under=every)
    with every(model):
        inside = hallucination(model, questions, lists)
    assert under.answers.yes.tolist() == inside.answers.yes.tolist()
    assert under.listings.texts == inside.listings.texts
    assert under.listings.texts != listings(model, lists).texts


def test_items_of_another_kind_are_refused(model) -> None:
    with pytest.raises(hw.InputError, match="whose answer is yes or no"):
        answers(model, hw.encode(hw.probe("place"), model, n=2))
    with pytest.raises(hw.InputError, match="names none of the objects"):
        listings(model, hw.encode([Item(prompt="What is it?", answer=" nothing", id="a")], model))
    with pytest.raises(hw.InputError, match="a list of words"):
        listings(model, hw.encode(hw.probe("listing"), model, n=2), objects="star")
